"""`fxfusion auto MODEL_DIR --text FILE --output DIR`: from an ordinary model to a fused checkpoint, in one command."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fxfusion.cli import options
from fxfusion.cli.conversion import Format
from fxfusion.cli.options import check_folder, check_format, read, read_share
from fxfusion.cli.plan import Perplexity, TargetDepth, Wish, work
from fxfusion.cli.results_folder import PLAN
from fxfusion.cli.road_options import RoadChoice
from fxfusion.cli.session import Session, Work, measuring_with
from fxfusion.errors import OptionError

_SEQUENCES = 256  # a refit wants some 50,000 tokens

Output = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Where the fused model goes; it replaces one that fxfusion wrote."),
]
FormatOption = Annotated[
    Format,
    typer.Option("--format", help="canonical: for fxfusion.from_pretrained; nemotron-nas: for serving engines."),
]


@measuring_with(sequences=_SEQUENCES)
def command(
    run: Session,
    choice: RoadChoice,
    output: Output = None,
    max_perplexity_increase: Perplexity = None,
    target_depth: TargetDepth = None,
    max_members: options.MaxMembers = None,
    format: FormatOption = Format.canonical,
) -> dict[str, Any]:
    """A plan, a fused and refitted checkpoint, its loss and its speed: for any model with its attention intact.

    Windows of layers become one: their attention goes first (or side by side, or away), their FFNs become one wide FFN,
    which is refitted in closed form. Without a budget: the least latency within 1% of the perplexity. An eighth of
    the text is held out; the loss that is reported is measured there. MODEL_DIR stays as it is.
    """
    check_folder(run.common.model_dir)
    if output is None:
        raise OptionError("--output: name the folder that the fused model goes to")
    run.check_output(output)
    run.check_writes(PLAN)
    run.require_text()
    share = read(max_perplexity_increase, partial(read_share, option="--max-perplexity-increase"))
    wish = Wish(
        max_perplexity_increase=share,
        target_depth=target_depth,
        max_members=max_members,
        preset="automatic",
        after_refit=True,
        **choice.arguments(),
    )
    check_format(run.common.model_dir, format.value)
    if run.common.dry_run:
        parts = [*work(run, wish), Work("refit on all text but an eighth"), Work("loss on the eighth, and speed here")]
        return run.plan_dry_run(parts, [PLAN, output])

    from fxfusion.cli.auto_work import make

    return make(run, wish, output, format)
