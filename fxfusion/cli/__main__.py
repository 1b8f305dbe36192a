"""`python -m fxfusion.cli`: the same as the `fxfusion` command."""

from fxfusion.cli import main

main()
