"""`fxfusion explain MODEL_DIR`: what would be fused in a model, from its config.json alone.

The model is built without weights, so a model of any size takes no memory to speak of.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.cli.options import AsJson, Overwrite, PlanFile, check_folder, read_layers
from fxfusion.cli.session import stdout_for_json
from fxfusion.errors import OptionError
from fxfusion.files import check_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfusion.plan.fusion_plan import FusionPlan
    from fxfusion.report import FusionReport

NOTHING_TO_FUSE = 3

ModelDir = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A local folder with the model's config.json.", show_default=False)
]
Policy = Annotated[
    str | None,
    typer.Option(help="maximal, paper, or fields as JSON, such as '{\"keep_last\": 1}'.", show_default="maximal"),
]
PlanGroup = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LAYERS",
        help="Layers to fuse, such as 4-8 or 4,5,6; may be repeated. Instead of a policy.",
        show_default=False,
    ),
]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.", show_default=False)]
Seq = Annotated[int, typer.Option(min=1, help="Tokens per sequence of the example input.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in the example input.")]


def command(
    model_dir: ModelDir,
    policy: Policy = None,
    plan: PlanFile = None,
    plan_group: PlanGroup = None,
    html: Html = None,
    as_json: AsJson = False,
    seq: Seq = 16,
    batch: Batch = 1,
    overwrite: Overwrite = False,
) -> None:
    """Show which FFNs of a model would be fused, and why others would not.

    Reads config.json only: no weights, no network. Exit code 0 if something would be fused, 3 if not.
    With --plan, the attention that the plan drops is dropped first.
    """
    chosen = read_policy(policy)
    groups = [read_layers(text, "--plan-group") for text in plan_group or ()]
    given = [name for name, value in (("--policy", policy), ("--plan", plan), ("--plan-group", groups)) if value]
    if len(given) > 1:
        raise OptionError(f"{given[0]} and {given[1]} were both given; a plan names its groups itself")
    if html is not None:
        check_file(html, "report", overwrite=overwrite, reads=[model_dir, *([] if plan is None else [plan])])
    with stdout_for_json(as_json):
        report = explain_config(model_dir, chosen, read_plan(plan, groups), seq, batch)
        if html is not None:
            report.to_html(html, title=f"fxfusion report: {model_dir.resolve().name}", overwrite=overwrite)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report)
        if html is not None:
            print(f"\nwritten: {html}")
    if not report.groups:
        raise typer.Exit(NOTHING_TO_FUSE)


def read_plan(file: Path | None, groups: list[list[int]]) -> FusionPlan | None:
    """The plan of a file, or of groups; None without either."""
    from fxfusion.plan.fusion_plan import FusionPlan

    if file is not None:
        return FusionPlan.load(file)
    return FusionPlan(groups=groups) if groups else None


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
    folder: Path, policy: str | dict[str, Any] | None, plan: FusionPlan | None, seq: int, batch: int
) -> FusionReport:
    """Build the model that `folder` describes, without weights, and explain it on `[batch, seq]` token ids."""
    from fxfusion.plan.policy import FusionPolicy

    # Checked before anything slow: a typing error should not cost the time to import torch.
    checked = None if plan else FusionPolicy.resolve(policy)
    check_folder(folder)

    import torch

    from fxfusion.cli.inputs import build_without_weights
    from fxfusion.compiler.pipeline import explain

    model = build_without_weights(folder)
    if plan is not None:
        drop_planned(model, plan)
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return explain(model, policy=checked, plan=plan, **inputs)


def drop_planned(model: PreTrainedModel, plan: FusionPlan) -> None:
    """Drop the attention that the plan drops, in place. Raises `PlanError` where the plan is for another model."""
    from fxfusion.models.drop_attention import drop_attention
    from fxfusion.models.fingerprint import check_fits

    check_fits(plan, model)
    if plan.dropped_attention:
        drop_attention(model, plan.dropped_attention)
