"""What `fxfusion eval` measured, for the model card of a folder that is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.results_folder import QUALITY, ResultsFolder, contents
from fxfusion.errors import OptionError

if TYPE_CHECKING:
    from fxfusion.plan.fusion_plan import FusionPlan

Measured = Annotated[
    Path | None,
    typer.Option(
        "--results", metavar="FOLDER", help="Put what `eval` measured there into the card.", show_default=False
    ),
]
_MEASURES = ("perplexity", "kl", "top1", "top5")


def card_of(results: Path | None, plan: FusionPlan) -> dict[str, Any] | None:
    """Fields of a model card; None without a folder. Raises `OptionError` where it knows nothing of this plan."""
    if results is None:
        return None
    latest = (ResultsFolder(results).read(QUALITY) or {}).get("latest")
    if not latest:
        raise OptionError(f"--results: {results} has no measured quality: run `fxfusion eval` with it first")
    if latest["plan_contents"] != contents(plan):
        raise OptionError(
            f"--results: what was measured in {results} is another plan; run `fxfusion eval` with this one"
        )
    quality = {
        f"{measure}, {name}": _words(found[measure])
        for name, found in latest["quality"].items()
        for measure in _MEASURES
        if found.get(measure) is not None
    }
    text = latest["text"]
    quality["text"] = f"{text['tokens']:,} tokens of {', '.join(Path(source).name for source in text['sources'])}"
    return {"quality": quality}


def _words(estimate: dict[str, float]) -> str:
    """Value and 95 % interval."""
    return f"{estimate['value']:.4g} [{estimate['low']:.4g}, {estimate['high']:.4g}]"
