"""`fxfusion explain MODEL_DIR`: what would be fused in a model, from its config.json alone.

The model is built without weights, so a model of any size takes no memory to speak of.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxfusion.errors import FxFusionError, OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxfusion.report import FusionReport

NOTHING_TO_FUSE = 3

ModelDir = Annotated[Path, typer.Argument(help="A local folder with the model's config.json.", show_default=False)]
Policy = Annotated[
    str | None,
    typer.Option(help="maximal, paper, or fields as JSON, such as '{\"keep_last\": 1}'.", show_default="maximal"),
]
PlanGroup = Annotated[
    list[str] | None,
    typer.Option(
        help="Layers to fuse, such as 4-8 or 4,5,6; may be repeated. Instead of a policy.", show_default=False
    ),
]
Html = Annotated[Path | None, typer.Option(help="Also write the report as one HTML page.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")]
Seq = Annotated[int, typer.Option(min=1, help="Tokens per sequence of the example input.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in the example input.")]


def command(
    model_dir: ModelDir,
    policy: Policy = None,
    plan_group: PlanGroup = None,
    html: Html = None,
    as_json: AsJson = False,
    seq: Seq = 16,
    batch: Batch = 1,
) -> None:
    """Show which FFNs of a model would be fused, and why others would not.

    Reads config.json only: no weights, no network. Exit code 0 if something would be fused, 3 if not.
    """
    chosen, groups = read_policy(policy), read_groups(plan_group or [])
    if chosen is not None and groups:
        raise OptionError("--policy and --plan-group were both given; a plan names its groups itself")
    # Whatever prints on the way (debug lines, warnings) must not get between the lines of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        report = explain_config(model_dir, chosen, groups, seq, batch)
        if html is not None:
            report.to_html(html, title=f"fxfusion report: {model_dir.resolve().name}")
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(report)
        if html is not None:
            print(f"\nwritten: {html}")
    if not report.groups:
        raise typer.Exit(NOTHING_TO_FUSE)


def read_policy(text: str | None) -> str | dict[str, Any] | None:
    """A preset's name, or fields from JSON. Raises `OptionError` where the text is neither."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        fields: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"--policy: not valid JSON: {error}") from None
    return fields


def read_groups(texts: list[str]) -> list[list[int]]:
    """`["4-6", "8,9"]` -> `[[4, 5, 6], [8, 9]]`. Raises `OptionError` that names the wrong text."""
    return [[layer for part in text.split(",") for layer in _read_range(part, text)] for text in texts]


def _read_range(part: str, whole: str) -> range:
    first, dash, last = part.strip().partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise OptionError(f"--plan-group: expected layers such as 4-8 or 4,5,6, got {whole!r}")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise OptionError(f"--plan-group: the range {part.strip()} of {whole!r} runs backwards")
    return numbers


def explain_config(
    folder: Path, policy: str | dict[str, Any] | None, groups: list[list[int]], seq: int, batch: int
) -> FusionReport:
    """Build the model that `folder` describes, without weights, and explain it on `[batch, seq]` token ids."""
    from fxfusion.plan import FusionPlan
    from fxfusion.policy import FusionPolicy

    # Checked before anything slow: a typing error should not cost the time to import torch.
    plan = FusionPlan(groups=groups) if groups else None
    checked = None if plan else FusionPolicy.resolve(policy)
    if not (folder / "config.json").is_file():
        what = "no such folder" if not folder.is_dir() else "the folder has no config.json"
        raise FxFusionError(f"{folder}: {what}; give the local folder of a model (nothing is downloaded)")

    import torch

    from fxfusion.pipeline import explain

    model = build_without_weights(folder)
    ids = torch.zeros(batch, seq, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return explain(model, policy=checked, plan=plan, **inputs)


def build_without_weights(folder: Path) -> PreTrainedModel:
    """The model of a config on the meta device, in eval mode, without a key-value cache."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FxFusionError(f"{folder}/config.json cannot be used: {reason}") from error
    config.use_cache = False
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    builder: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = builder.from_config(config, trust_remote_code=False)
    if model.main_input_name != "input_ids":
        raise FxFusionError(
            f"{folder}: the model's input is {model.main_input_name}, not token ids; use fxfusion.explain from Python"
        )
    model.eval()
    return model
