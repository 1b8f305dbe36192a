"""`fxfusion demo`: the main job from end to end on the trained reference model.

Attention is removed from some middle layers, the FFNs left there form a chain, the compiler fuses it,
and the demo shows what was found, that the rewrite is exact, what it cost in quality and what it gained.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli import reference
from fxfusion.cli.options import Overwrite
from fxfusion.cli.screen import Screen
from fxfusion.errors import OptionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from fxfusion.cli.steps import Settings

ModelDir = Annotated[
    Path | None, typer.Option("--model", help="Folder of the reference model.", show_default="that of the clone")
]
Html = Annotated[Path, typer.Option(help="Where to write the report.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print all results as one JSON document, and nothing else.")]
Compiler = Annotated[str, typer.Option(help="inductor, aot_eager or eager (needs no C++ compiler).")]
Sequences = Annotated[int, typer.Option(min=8, help="Held-out sequences of 256 tokens that quality is measured on.")]
Rounds = Annotated[int, typer.Option(min=5, help="Timing rounds.")]


def command(
    model: ModelDir = None,
    html: Html = Path("fxfusion_report.html"),
    as_json: AsJson = False,
    compiler: Compiler = "inductor",
    sequences: Sequences = 48,
    rounds: Rounds = 40,
    overwrite: Overwrite = False,
) -> None:
    """Take a trained model through the whole of fxfusion: find, fuse, prove, measure (under 3 minutes)."""
    if compiler not in ("inductor", "aot_eager", "eager"):
        raise OptionError(f"--compiler: expected inductor, aot_eager or eager, got {compiler!r}")
    folder = reference.find_folder(model)
    check_file(html, "report", overwrite=overwrite, reads=[folder])
    started = time.perf_counter()
    screen = Screen(quiet=as_json)
    screen.line("Loading PyTorch ...", "dim")
    from fxfusion.cli.steps import Settings

    settings = Settings(
        folder=folder, html=html, overwrite=overwrite, compiler=compiler, sequences=sequences, rounds=rounds
    )
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = run(settings, screen)
    result["seconds"] = time.perf_counter() - started
    screen.line(f"\nDone in {result['seconds']:.0f} s.")
    if as_json:
        print(json.dumps(result, indent=2))
    if not result["exactness"]["passed"]:
        raise typer.Exit(1)


def run(settings: Settings, screen: Screen) -> dict[str, Any]:
    """All steps in order; what they measured, ready for JSON."""
    import torch

    from fxfusion.cli import steps

    with torch.no_grad():
        subject = steps.load(settings, screen)
        steps.drop_attention(subject, screen)
        steps.explain(subject, screen)
        steps.compile_and_prove(subject, settings, screen)
        steps.measure_quality(subject, screen)
        steps.measure_speed(subject, settings, screen)
        steps.write_report(subject, settings, screen)
        steps.summarise(subject, screen)
    return subject.result
