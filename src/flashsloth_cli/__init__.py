"""The command line. It stands beside the `flashsloth` package, whose import loads torch and transformers, so that
`flashsloth --help` answers at once.
"""
