"""`fxfusion explain MODEL`: what would be fused in a model, from its config.json, or a file's header, alone.

The model is built without weights, so a model of any size takes no memory to speak of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxfusion
from fxfusion.cli import options
from fxfusion.cli.options import check_model, read_layers
from fxfusion.cli.session import Run, command
from fxfusion.errors import OptionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.report import FusionReport

NOTHING_TO_FUSE = 3

Policy = Annotated[
    str | None,
    typer.Option(help="maximal, paper, or fields as JSON, such as '{\"keep_last\": 1}'.", show_default="maximal"),
]
PageOutput = Annotated[
    Path | None,
    typer.Option("--output", metavar="FILE", help="Also write the report as one HTML page.", show_default=False),
]
Length = Annotated[int, typer.Option(min=1, help="Tokens per sequence of the example input.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in the example input.")]


@command
def explain(
    run: Run,
    model_dir: options.ModelDir,
    policy: Policy = None,
    plan: options.PlanFile = None,
    groups: options.Groups = None,
    output: PageOutput = None,
    length: Length = 16,
    batch: Batch = 1,
) -> dict[str, Any]:
    """Show which FFNs of a model would be fused, and why others would not.

    Reads config.json, or the header of a GGUF file: no weights, no network. Exit code 0 if something would be fused, 3
    if not. With --plan, the attention that the plan drops is dropped first.
    """
    chosen = read_policy(policy)
    layers = [read_layers(text, "--groups") for text in groups or ()]
    given = [name for name, value in (("--policy", policy), ("--plan", plan), ("--groups", groups)) if value]
    if len(given) > 1:
        raise OptionError(f"{given[0]} and {given[1]} were both given; a plan names its groups itself")
    if output is not None:
        check_file(output, "report", overwrite=run.overwrite, reads=[model_dir, *filter(None, [plan])])
    named = fxfusion.FusionPlan.load(plan) if plan else fxfusion.FusionPlan(groups=layers) if layers else None
    run.tell_read(model_dir)
    report = explain_config(model_dir, chosen, named, length, batch)
    run.screen.line(str(report))
    if output is not None:
        report.to_html(output, title=f"fxfusion report: {model_dir.resolve().name}", overwrite=run.overwrite)
        run.screen.line(f"\nwritten: {output}")
    run.exit_code = 0 if report.groups else NOTHING_TO_FUSE
    return report.to_dict()


def read_policy(text: str | None) -> str | dict[str, Any] | None:
    """A preset's name, or fields from JSON. Raises `OptionError` where the text is neither."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        fields: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"--policy: not valid JSON: {error}") from None
    return fields


def explain_config(
    folder: Path, policy: str | dict[str, Any] | None, plan: FusionPlan | None, length: int, batch: int
) -> FusionReport:
    """Build the model that `folder` describes, without weights, and explain it on `[batch, length]` token ids."""
    # Checked before anything slow: a typing error should not cost the time to import torch.
    checked = None if plan else fxfusion.FusionPolicy.resolve(policy)
    check_model(folder)

    import torch

    from fxfusion.cli.inputs import build_without_weights
    from fxfusion.models.fingerprint import check_fits

    model = build_without_weights(folder)
    if plan is not None:
        check_fits(plan, model)
        if plan.dropped_attention:
            fxfusion.drop_attention(model, plan.dropped_attention)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return fxfusion.explain(model, policy=checked, plan=plan, **inputs)
