"""The `fxfusion` command.

| exit code | means |
|---|---|
| 0 | done, and something was fused |
| 1 | it failed; one line on stderr says why (`FXFUSION_DEBUG=1` shows the traceback) |
| 2 | the command line is wrong |
| 3 | nothing to fuse |

This package is read before every command, `--help` too, so torch and transformers are imported by the
commands that need them.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from fxfusion.cli import demo, explain
from fxfusion.errors import OptionError, PlanError

app = typer.Typer(
    help="FFN Fusion (arXiv 2503.18908) for PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: loading rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("explain")(explain.command)
app.command("demo")(demo.command)


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        app()
    except Exception as error:
        if os.environ.get("FXFUSION_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
        print(f"fxfusion: error: {first_line}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, (OptionError, PlanError)) else 1) from None


if __name__ == "__main__":
    main()
