"""Models without weights: parameters on the meta device, so that memory is taken only when their values come.

outline(config)        everything on the meta device: shapes and names
empty_model(config)    parameters on the meta device, buffers real, since no file holds most of them
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.errors import CheckpointError

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
        return CONFIG_MAPPING[kind].from_dict(_without_code(data))
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
    check_buffers(outline(config, dtype))
    with _meta_parameters():
        return _build(config, dtype).eval()


def check_buffers(model: nn.Module) -> None:
    """Raises `CheckpointError` where those of a model on the meta device would be too large."""
    size = sum(value.nbytes for value in model.buffers())
    if size > _MAX_BUFFER_BYTES:
        raise CheckpointError(f"the config asks for buffers of {size} bytes, more than {_MAX_BUFFER_BYTES}")


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
