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

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

import fxfusion
from fxfusion.cli import auto, check, compare, eval, explain, fuse, generate, measure, plan, recover, report, simulate
from fxfusion.errors import OptionError, PlanError


def new_app(**more: Any) -> typer.Typer:
    """A command line without commands."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,  # plain help: loading rich would double the time that --help takes
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        **more,
    )


app = new_app(no_args_is_help=True)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"fxfusion {fxfusion.__version__}")
        raise typer.Exit


@app.callback()
def _fxfusion(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say the version, and leave.")
    ] = False,
) -> None:
    """FFN Fusion (arXiv 2503.18908) for PyTorch models."""


for name, body, what in (
    ("auto", auto.auto, "From an ordinary model to a fused checkpoint, in one go."),
    ("score", measure.score, "What each attention is worth."),
    ("matrix", measure.matrix, "How much each block depends on those before it."),
    ("plan", plan.plan, "Choose what to drop and to fuse, within a budget."),
    ("explain", explain.explain, "What would be fused, and what not, and why."),
    ("eval", eval.evaluate, "What a plan costs in quality, gains in speed."),
    ("sweep", measure.sweep, "What every depth costs: table, plot, front."),
    ("compare", compare.compare, "Plans against other ways to a shorter model."),
    ("report", report.report, "One page of all results."),
    ("simulate", simulate.simulate, "What a model would do on a device, and gain."),
    ("fuse", fuse.fuse, "Write a folder of the fused model."),
    ("refit", recover.refit, "Fuse, and make good what that cost."),
    ("recover", recover.recover, "Train a fused model from the intact one."),
    ("unfuse", fuse.unfuse, "Write a folder with the groups taken apart."),
    ("export", fuse.export, "Write a folder that serving engines load."),
    ("check", check.check, "Is a model folder whole and right?"),
    ("generate", generate.generate, "Text from a model folder."),
):
    app.command(name, short_help=what)(body)

# transformers imports torchao where it is there: its missing extensions, and what its enums do to pytrees, are nobody's
# concern here.
_NOISY = ("torchao", "torch.utils._pytree")
_INTERRUPTED = 130  # what typer makes of Ctrl-C


def main(line: Callable[[], Any] | None = None) -> None:
    """Run a command line, `fxfusion`'s where none is given, and leave with its exit code."""
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        (line or app)()
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
