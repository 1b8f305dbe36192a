"""What commands work on: models and tokenizers from local folders, text as batches, a device. Imported when it is used.

Whatever is wrong with any of them is an `FxFusionError` of one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from fxfusion.analysis.batches import require_causal
from fxfusion.analysis.planned import analyse_without
from fxfusion.analysis.texts import batches_from_text
from fxfusion.checkpoints import quantised
from fxfusion.checkpoints.api import from_pretrained
from fxfusion.checkpoints.canonical_load import CONFIG, PLAN, read_plan
from fxfusion.checkpoints.canonical_save import refuse_removed
from fxfusion.checkpoints.empty_model import config_of, outline
from fxfusion.checkpoints.gguf.header import SUFFIX, GgufFile, is_gguf
from fxfusion.checkpoints.gguf.load import load_tokenizer as load_gguf_tokenizer
from fxfusion.checkpoints.gguf.load import read_config as read_gguf_config
from fxfusion.checkpoints.listed_layers import table_of
from fxfusion.checkpoints.llama_cpp import export as gguf_export
from fxfusion.checkpoints.nemotron_nas import load as nemotron
from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.export import plan_export
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder
from fxfusion.checkpoints.per_layer.any_model import AnyModelPlan
from fxfusion.checkpoints.per_layer.export import ExportPlan
from fxfusion.checkpoints.reading import SafeFolder, silent
from fxfusion.cli.options import Format, GgufType, check_model
from fxfusion.cost.layer_forms import BLOCKS, PER_LAYER
from fxfusion.errors import CheckpointError, FxFusionError, OptionError, first_line
from fxfusion.graph.provenance import layer_numbers
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.plain_save import ADVICE
from fxfusion.models.traced import TracedGraph, TracedModel
from fxfusion.plan.fusion_plan import FusionPlan

_PROBE = 8  # tokens


def is_nemotron(folder: Path) -> bool:
    """Whether a folder is in the nemotron-nas layout, whose classes are ours: those of the folder are never run."""
    try:
        return bool(SafeFolder.of(folder).json(CONFIG).get("model_type") == nemotron.MODEL_TYPE)
    except CheckpointError:  # whoever reads the file says what is wrong with it
        return False


def lists_layers(folder: Path) -> bool:
    """Whether a folder's config lists its layers one by one, so that our own reader builds them."""
    try:
        found = {} if is_gguf(folder) else SafeFolder.of(folder).json(CONFIG)
    except CheckpointError:  # whoever reads the file says what is wrong with it
        return False
    lists = any(found.get(name) is not None for name in (BLOCKS, PER_LAYER))
    return lists and found.get("model_type") != nemotron.MODEL_TYPE


def load_config(folder: Path) -> Any:
    check_model(folder)
    if is_gguf(folder):
        return read_gguf_config(GgufFile.read(folder))
    if is_nemotron(folder):
        return nemotron.read_config(SafeFolder.of(folder))
    if lists_layers(folder):
        return config_of(SafeFolder.of(folder).json(CONFIG), folder / CONFIG)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise FxFusionError(f"{folder}/config.json cannot be used: {first_line(error)}") from error
    if getattr(config, "fxfusion", None):
        raise FxFusionError(
            f"{folder}/config.json: the model was changed by fxfusion and then saved without it, so plain transformers "
            f"would load another one; {ADVICE}"
        )
    return config


def causal_config(folder: Path) -> Any:
    """The config of a causal language model, with no use for a key-value cache."""
    config = load_config(folder)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or is_nemotron(folder)
    if not known or getattr(config, "is_encoder_decoder", False):
        raise FxFusionError(
            f"{folder}: a model of type {config.model_type!r} is no causal language model; nothing here can measure it"
        )
    config.use_cache = False
    return config


def build_without_weights(folder: Path, *, changed: bool = True) -> PreTrainedModel:
    """The model of a folder on the meta device, in eval mode, without a key-value cache. Need not be causal.

    `changed`: with what the plan that lies in the folder drops and fuses, as `load_model` gives it.
    """
    config = load_config(folder)
    config.use_cache = False
    if is_nemotron(folder):
        return nemotron.outline_of(SafeFolder.of(folder), config)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if causal and table_of(config):
        return cast(PreTrainedModel, outline(config).eval())
    builder: Any = AutoModelForCausalLM if causal else AutoModel
    with torch.device("meta"):
        model: PreTrainedModel = builder.from_config(config, trust_remote_code=False)
    if model.main_input_name != "input_ids":
        raise FxFusionError(
            f"{folder}: the model's input is {model.main_input_name}, not token ids; use fxfusion.explain from Python"
        )
    model.eval()
    plan = changes_of(folder) if changed else None
    return model if plan is None else fuse(model, plan)


def graph_without_weights(folder: Path, tokens: int) -> tuple[PreTrainedModel, TracedGraph]:
    """The model on the meta device, and its graph."""
    model = build_without_weights(folder)
    return model, TracedModel(model).graph(torch.zeros(1, tokens, dtype=torch.long, device="meta"))


def describe(graph: TracedGraph) -> list[dict[str, Any]]:
    """All layers. `width`: of the FFN, 0 where there is none that could be fused."""
    found = analyse_without(graph, ())
    widths: dict[int, int] = {}
    numbers = layer_numbers([ffn.layer for ffn in found.matches.ffns])
    for number, ffn in zip(numbers, found.matches.ffns, strict=True):
        if number is not None:
            widths[number] = widths.get(number, 0) + ffn.width
    mixers = {block.layer for block in graph.blocks.mixers}
    count = 1 + max(block.layer for block in graph.blocks.layers)
    return [
        {"number": number, "has_mixer": number in mixers, "width": widths.get(number, 0)} for number in range(count)
    ]


def format_of(model: PreTrainedModel) -> Format:
    """The layout that a model is of."""
    if model.config.model_type == nemotron.MODEL_TYPE:
        return Format.nemotron_nas
    return Format.anymodel if table_of(model.config) else Format.canonical


def check_format(
    folder: Path,
    format: Format,
    plan: FusionPlan | None = None,
    roads: Sequence[str] | None = None,
    *,
    output: Path | None = None,
    gguf_type: GgufType = GgufType.auto,
) -> None:
    """Raises where a model cannot be written in that layout, by its config alone, under a plan or one over some roads,
    or not to that place: before hours of work on it."""
    if output is not None and (output.suffix.lower() == SUFFIX) != (format is Format.gguf):
        how = f"is one file: name one that ends in {SUFFIX}" if format is Format.gguf else "is a folder"
        raise OptionError(f"--output {output}: the format {format.value} {how}")
    if gguf_type is not GgufType.auto and format is not Format.gguf:
        raise OptionError(f"--gguf-type is of --format gguf, not of {format.value}")
    if format is Format.canonical and plan is not None:
        refuse_removed(plan)
    if format is Format.canonical and "remove" in (roads or ()) and len(roads or ()) > 1:
        raise OptionError(
            "--roads remove: beside other roads it needs --format nemotron-nas, as there is no canonical form of both"
        )
    if format is Format.gguf:
        model = build_without_weights(folder)
        gguf_export.check_model(model, folder, read_type(gguf_type))
    elif format is Format.nemotron_nas:
        plan_export(build_without_weights(folder), check=False)
    elif format is Format.anymodel:
        AnyModelPlan.of(build_without_weights(folder))
    elif is_nemotron(folder):
        raise OptionError(
            f"--format {format.value}: {folder} is in the nemotron-nas layout, which has no {format.value} form"
        )
    elif format is Format.canonical and lists_layers(folder):
        raise OptionError(f"--format {format.value}: the layers of {folder} differ, as its config lists them: anymodel")
    elif format is Format.transformers:
        ExportPlan.of(build_without_weights(folder))


def check_rounding(
    folder: Path, format: Format, plan: FusionPlan | None, quantize: str | None, group_size: int | None
) -> None:
    """Raises where the model of a folder, under a plan, cannot be quantised so, by its shapes."""
    grid = quantised.grid_of(quantize, group_size, format.value)
    if grid is not None:
        model: Any = build_without_weights(folder)
        model = model if plan is None else fuse(model, plan)
        if format is Format.nemotron_nas:  # whose widths are rounded up
            model = empty_decoder(DeciLMConfig(**plan_export(model, check=False).config))
        quantised.check_layers(model, grid)


def read_type(given: GgufType) -> Any:
    """As `save_pretrained` takes it."""
    return None if given is GgufType.auto else given.value


def stored_plan(path: Path) -> FusionPlan | None:
    """The plan that a folder holds; a GGUF file holds none. Raises `PlanError`."""
    return None if is_gguf(path) else read_plan(SafeFolder.of(path))


def changes_of(folder: Path) -> FusionPlan | None:
    """What is done to the model of a folder as it is loaded, by the plan in it; None where nothing is. A folder
    that lists its layers holds what it is. Raises `PlanError`."""
    known = stored_plan(folder)
    holds_itself = is_nemotron(folder) or lists_layers(folder)
    return known if known is not None and is_changed(folder) and not holds_itself else None


def is_changed(folder: Path) -> bool:
    """Whether a folder holds a model that fxfusion made of another one, by the plan in it. Raises `PlanError`."""
    known = stored_plan(folder)
    return known is not None and bool(known.groups or known.dropped_attention or known.refit)


def check_intact(folder: Path) -> None:
    """Raises `FxFusionError` where a folder's model was changed already: a plan names layers of the model as it was."""
    known = changes_of(folder)
    if known is not None:
        was = "refitted" if known.refit else "fused, or lost attention,"
        raise FxFusionError(f"{folder} was {was} already ({PLAN}): give the folder of the model as it was")


def pick_device(name: str) -> torch.device:
    """`auto`: an accelerator if there is one. Raises `OptionError` for a device that cannot be used here."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(f"--device {name}: cannot be used here: {first_line(error)}") from None
    return device


def load_model(folder: Path, device: torch.device, dtype: str) -> PreTrainedModel:
    """The trained model in eval mode, changed as the plan in its folder says. `dtype` auto: float32 on a CPU, elsewhere
    as it is stored.

    Raises `FxFusionError` where weights are missing or do not fit, or where tokens see later ones.
    """
    config = causal_config(folder)
    model: PreTrainedModel
    wanted: Any = dtype if dtype != "auto" else ("float32" if device.type == "cpu" else "auto")
    if is_gguf(folder) or is_nemotron(folder) or lists_layers(folder) or changes_of(folder) is not None:
        model = from_pretrained(folder, dtype=wanted, device=device)
        model.config.use_cache = False
    else:
        model = _load(folder, config, device, wanted)
    try:
        require_causal(model, torch.arange(_PROBE)[None] % vocabulary(config))
    except ValueError as error:
        raise FxFusionError(f"{folder}: {error}") from None
    return model


def _load(folder: Path, config: Any, device: torch.device, dtype: str) -> PreTrainedModel:
    """What has nothing of ours in it, by transformers: it reads what `from_pretrained` does not (quantised weights)."""
    try:
        with silent():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            model: PreTrainedModel = loaded[0].eval()
            model.to(device)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise FxFusionError(f"{folder}: the model cannot be loaded: {first_line(error)}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise FxFusionError(f"{folder}: its weights are broken: {first_line(error)}; copy the folder anew") from error
    absent = sorted(str(name) for what in ("missing_keys", "mismatched_keys") for name in loaded[1][what])
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise FxFusionError(f"{folder}: the weights of {absent[0]}{more} are missing or of another shape")
    return model


def load_tokenizer(folder: Path) -> Any:
    if is_gguf(folder):
        return load_gguf_tokenizer(folder)
    try:
        with silent():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise FxFusionError(
            f"{folder}: no tokenizer can be loaded from it ({first_line(error)}); add its tokenizer files, or give "
            "--text token ids as a .safetensors file"
        ) from error


def read_batches(
    sources: Sequence[Path],
    tokenizer: Any,
    *,
    length: int,
    batch: int,
    sequences: int,
    seed: int,
    suffixes: Sequence[str] = (),
    progress: bool = False,
) -> list[Tensor]:
    """`int64 [batch, length]` each, `sequences` rows at most; several sources take turns."""
    rows = min(batch, sequences)
    limit = sequences // rows
    more: dict[str, Any] = {"suffixes": tuple(suffixes)} if suffixes else {}
    found = []
    for source in sources:
        try:
            one = batches_from_text(
                source, tokenizer, length=length, batch=rows, limit=limit, seed=seed, progress=progress, **more
            )
        except OptionError as error:
            raise OptionError(f"--text: {str(error).replace('suffixes=', '--suffix')}") from error
        found.append(one)
    return [each for each in chain.from_iterable(zip_longest(*found)) if each is not None][:limit]


def check_ids(batches: Sequence[Tensor], config: Any) -> None:
    """Raises `OptionError` where the model has no such tokens."""
    known, largest = vocabulary(config), max(int(each.max()) for each in batches)
    if largest >= known:
        raise OptionError(
            f"--text: it holds token {largest}, and the model knows {known} tokens: made by another tokenizer?"
        )


def check_length(length: int, config: Any) -> None:
    """Raises `OptionError` where the model has no room for so many tokens."""
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(room, int) and 0 < room < length:
        raise OptionError(f"--length {length}: the model reads {room} tokens at most")


def vocabulary(config: Any) -> int:
    """How many tokens the model knows."""
    return int(config.get_text_config().vocab_size)
