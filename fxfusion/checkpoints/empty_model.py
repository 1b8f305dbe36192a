"""Which tensors a model has, and models without weights: memory is taken only when values come.

outline(config)        everything on the meta device: shapes and names
empty_model(config)    parameters on the meta device, buffers real, since no file holds most of them
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.listed_layers import give_layers, table_of, take_out, with_table
from fxfusion.cost.layer_forms import KNOWN
from fxfusion.errors import CheckpointError, SurgeryError
from fxfusion.models.adapters.wrappers import find_wrappers
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.plan.fusion_plan import FusionPlan

log = logging.getLogger("fxfusion")

# Of the buffers that a config asks for. Real ones are a few megabytes; masks of long contexts may have more.
_MAX_BUFFER_BYTES = 2**32


# Settings by which a config names code, or other files: classes in the folder, kernels on the hub, patches of classes.
_NAMES_CODE = (
    *("auto_map", "attn_implementation", "experts_implementation", "use_kernels", "kernel_config"),
    *("fusion_config", "transformers_weights", "distributed_config"),
)


def config_of(data: Mapping[str, Any], where: object) -> Any:
    """The transformers config for the content of a `config.json`; code that it names is neither run nor fetched.

    Raises `CheckpointError` where transformers has no such model, or the values do not fit it.
    """
    from transformers import CONFIG_MAPPING

    try:
        data, table = with_table(data)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        hint = ", and code of the folder is never run" if "auto_map" in data else ""
        raise CheckpointError(f"{where}: transformers has no model_type {kind!r}{hint}")
    if data.get("quantization_config") is not None:
        raise CheckpointError(f"{where}: the weights are quantised; fuse first, then quantise")
    if "fxfusion" in data:
        raise CheckpointError(
            f"{where}: the model was changed by fxfusion and then saved without it; fxfusion.save_pretrained writes "
            "what is needed to load it"
        )
    try:
        config = CONFIG_MAPPING[kind].from_dict(_without_code(data))
        if table is not None:
            setattr(config, KNOWN, table)
        return config
    except Exception as error:  # whatever a config class makes of bad values
        raise CheckpointError(f"{where}: no valid config of a {kind} model: {error}") from error


def _without_code(value: Any) -> Any:
    """The same without the settings that name code or are private, at every depth."""
    if isinstance(value, list):
        return [_without_code(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    kept = {name: item for name, item in value.items() if name not in _NAMES_CODE and not name.startswith("_")}
    return {name: _without_code(item) for name, item in kept.items()}


def outline(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The causal language model of a config, on the meta device. Raises `CheckpointError` where there is none."""
    with torch.device("meta"):
        return _build(config, dtype)


def empty_model(config: Any, dtype: torch.dtype | None = None) -> Any:
    """The same with real buffers, in eval mode. Raises `CheckpointError`, also where these would be too large."""
    with torch.device("meta"):
        check_buffers(_alike(config, dtype))
    with _meta_parameters():
        return _build(config, dtype).eval()


def check_buffers(model: nn.Module) -> None:
    """Raises `CheckpointError` where those of a model on the meta device would be too large."""
    size = sum(value.nbytes for value in model.buffers())
    if size > _MAX_BUFFER_BYTES:
        raise CheckpointError(f"the config asks for buffers of {size} bytes, more than {_MAX_BUFFER_BYTES}")


def fuse_on_meta(model: Any, plan: FusionPlan, shards: int) -> bool:
    """Apply a plan to a model without weights. False where its code does not run on the meta device: such a model is
    fused when it has its weights."""
    try:
        with all_on_meta(model):
            fuse(model, plan, shards=shards)
    except SurgeryError as error:
        log.info("the plan is applied after the weights are read, since it cannot be before: %s", error)
        return False
    state = fused_state(model)
    if state is not None:
        gone = (*state.shells.values(), *state.parts.values())
        real_empties(part for shell in gone for part in shell.modules())
    return True


@contextmanager
def all_on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, every tensor of the model is a meta one, as surgery needs one device. After, buffers are real again."""
    swapped: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        for values in (module._buffers, vars(module)):
            real = {name: value for name, value in values.items() if isinstance(value, Tensor) and not value.is_meta}
            for name, value in real.items():
                swapped.append((values, name, value))
                values[name] = value.to("meta")
    try:
        yield
    finally:
        for values, name, value in swapped:
            now = values.get(name)
            if isinstance(now, Tensor) and now.is_meta and now.shape == value.shape:
                values[name] = value
        real_empties(model.modules())


def real_empties(modules: Iterable[nn.Module]) -> None:
    """Take buffers without any value, which surgery leaves where a norm was, off the meta device."""
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and not buffer.numel():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")


def _build(config: Any, dtype: torch.dtype | None) -> Any:
    forms = table_of(config)
    if not forms:
        return _alike(config, dtype)
    model = _alike(copy.deepcopy(config), dtype)  # which is written into
    give_layers(model, forms)
    with all_on_meta(model):
        take_out(model, forms)
    return model


def _alike(config: Any, dtype: torch.dtype | None) -> Any:
    """The model with all its layers alike."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # whatever a model class makes of a config
        kind = getattr(config, "model_type", type(config).__name__)
        raise CheckpointError(f"no causal language model can be built from the config ({kind}): {error}") from error


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Every parameter that a module registers is moved to the meta device at once."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def tied_names(model: Any) -> dict[str, str]:
    """Names that stand for another tensor as the config says, with the name of that: `lm_head.weight` as a rule."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def check_plain(model: Any) -> None:
    """Raises `CheckpointError` that names what no format holds: adapters, quantised or sharded weights."""
    wrapper = next(iter(find_wrappers(model)), None)
    if wrapper is not None:
        raise CheckpointError(
            f"{wrapper.path} has adapters, which are no part of the model: merge them first (`merge_and_unload`); PEFT "
            "saves them alone"
        )
    for name, value in model.state_dict(keep_vars=True).items():
        if type(value.detach()) is not Tensor:
            raise CheckpointError(
                f"{name} is a {type(value.detach()).__name__}, and only plain tensors are written: fuse and save the "
                "model first, then quantise or shard what from_pretrained loads"
            )
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantised is not None:
        raise CheckpointError(
            "the model is quantised (config.quantization_config), and only plain tensors are written: fuse and save it "
            "first, then quantise what from_pretrained loads"
        )


def own_tensors(model: Any) -> dict[str, Tensor]:
    """All others, by name, in the model's order."""
    tied = tied_names(model)
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if name not in tied}


def changes_stored(model: Any) -> bool:
    """Whether transformers stores some tensors of such a model in another form than the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def changed_own(model: Any) -> tuple[str, bool] | None:
    """A tensor that transformers would take for another one if a folder had it by the model's own name, and whether it
    would change its values, too; None where there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = get_model_conversion_mapping(model, add_legacy=False)
    converters = [one for one in known if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in known if not isinstance(one, WeightConverter)]
    for name in own_tensors(model) if known else ():
        renamed, pattern = rename_source_key(name, renamings, converters)
        if renamed != name or pattern is not None:
            return name, pattern is not None
    return None
