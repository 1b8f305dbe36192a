"""`python -m fxfusion`: the same as the `fxfusion` command."""

from fxfusion.cli import main

if __name__ == "__main__":
    main()
