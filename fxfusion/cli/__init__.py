"""The `fxfusion` command.

| exit code | means |
|---|---|
| 0 | done; of `explain`: something would be fused |
| 1 | it failed or was interrupted; one line on stderr says why (`FXFUSION_DEBUG=1` shows the traceback) |
| 2 | the command line is wrong: an option, a plan that is broken or for another model, a budget that no plan keeps |
| 3 | `explain`: nothing to fuse |

This package is read before every command, `--help` too, so torch and transformers are imported by the
commands that need them.
"""

from __future__ import annotations

import os
import sys
import traceback

import typer

from fxfusion.cli import (
    auto,
    check,
    demo,
    explain,
    export,
    fuse,
    generate,
    matrix,
    plan,
    recover,
    refit,
    report,
    score,
    simulate,
    sweep,
    unfuse,
)
from fxfusion.cli import eval as evaluate
from fxfusion.errors import OptionError, PlanError

app = typer.Typer(
    help="FFN Fusion (arXiv 2503.18908) for PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: loading rich would double the time that --help takes
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for name, body, what in (
    ("auto", auto.command, "From an ordinary model to a fused checkpoint, in one go."),
    ("score", score.command, "What each attention is worth."),
    ("matrix", matrix.command, "How much each block depends on those before it."),
    ("plan", plan.command, "Choose what to drop and to fuse, within a budget."),
    ("explain", explain.command, "What would be fused, and what not, and why."),
    ("eval", evaluate.command, "What a plan costs in quality, gains in speed."),
    ("sweep", sweep.command, "What every depth costs: table, plot, front."),
    ("report", report.command, "One page of all results."),
    ("simulate", simulate.command, "What a model would do on a device, and gain."),
    ("fuse", fuse.command, "Write a folder of the fused model."),
    ("refit", refit.command, "Fuse, and make good what that cost."),
    ("recover", recover.command, "Train a fused model from the intact one."),
    ("unfuse", unfuse.command, "Write a folder with the groups taken apart."),
    ("export", export.command, "Write a folder that serving engines load."),
    ("check", check.command, "Is a model folder whole and right?"),
    ("generate", generate.command, "Text from a model folder."),
    ("demo", demo.command, "The whole job on a small trained model."),
):
    app.command(name, short_help=what)(body)

_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            fail("interrupted", 1)
        raise
    except Exception as error:
        if os.environ.get("FXFUSION_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        first_line = (str(error) or type(error).__name__).strip().splitlines()[0]
        # What comes of a full disk or a missing permission is no fault of the command line.
        is_wrong_use = isinstance(error, (OptionError, PlanError)) and not isinstance(error.__cause__, OSError)
        fail(first_line, 2 if is_wrong_use else 1)


def fail(why: str, code: int) -> None:
    """Say why on one line, and leave."""
    print(f"fxfusion: error: {why}", file=sys.stderr)
    raise SystemExit(code) from None


if __name__ == "__main__":
    main()
