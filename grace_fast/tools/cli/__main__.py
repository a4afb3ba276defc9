"""Entry point of `python -m grace_fast.tools.cli`."""

from grace_fast.tools.cli import main

main()
