"""`python -m flashsloth_cli`."""

from flashsloth_cli.main import entry_point

entry_point()
