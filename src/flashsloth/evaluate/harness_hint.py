"""What to install where lmms-eval is missing."""

HINT = (
    "evaluating needs lmms-eval: pip install 'flashsloth[eval]' && pip install --no-deps lmms-eval==0.7.3 "
    "(--no-deps, since it pins other versions of libraries than these)"
)
