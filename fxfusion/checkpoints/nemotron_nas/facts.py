"""What a config says that the layout cannot: windows, multipliers, other positions than rotary ones.

Together with the tensors (`parts.py`) and the modules (`probe.py`) this decides without weights. With weights, the
logits are compared as well (`proof.py`).
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fxfusion.checkpoints.nemotron_nas.parts import DecoderParts
from fxfusion.errors import CheckpointError

# Factors on embeddings, residual branches, attention and logits, in the words of many configs.
_FACTOR = re.compile(
    r".*multiplier|.*(logits?|attention|attn|embedding|residual|depth|emb)_scal(e|ing)|.*softcap\w*|scale_\w+"
)
_NEUTRAL = (None, False, 1, 1.0, "")


def check_facts(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    """Raises `CheckpointError` that names the setting for which the layout has no word."""
    _check_window(model, config, parts)
    for name, value in vars(config).items():
        if _FACTOR.fullmatch(name) and isinstance(value, (int, float)) and value not in _NEUTRAL:
            raise CheckpointError(f"the nemotron-nas layout has no such factor: config.{name} = {value}")
    _check_positions(model, config, parts)


def _check_window(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    reach = getattr(config, "max_position_embeddings", None) or 0
    windows = {"config": getattr(config, "sliding_window", None)}
    for layer in parts.layers:
        if layer.has_attention:
            path = layer.modules["attention"]
            windows[path] = getattr(model.get_submodule(path), "sliding_window", None)
    for where, window in windows.items():
        if window is not None and window < reach:
            raise CheckpointError(f"the nemotron-nas layout has no sliding window ({where}.sliding_window = {window})")
    types = set(getattr(config, "layer_types", None) or ())
    if others := types - {"full_attention"}:
        raise CheckpointError(
            f"the nemotron-nas layout has one kind of attention, and config.layer_types has {sorted(others)}"
        )


def _check_positions(model: nn.Module, config: Any, parts: DecoderParts) -> None:
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise CheckpointError(
            f"the nemotron-nas layout has one rotary embedding for all layers; config.rope_parameters is {rope!r}"
        )
    part = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if part not in (None, 1, 1.0):
        raise CheckpointError(
            f"the nemotron-nas layout rotates whole heads; the model rotates {part} of each (partial_rotary_factor)"
        )
    without = [number for number, flag in enumerate(getattr(config, "no_rope_layers", None) or ()) if not flag]
    if without:
        raise CheckpointError(
            f"the nemotron-nas layout rotates in every layer; config.no_rope_layers leaves out layer {without[0]}"
        )
    for layer in parts.layers:
        path = layer.modules.get("attention")
        module = None if path is None else model.get_submodule(path)
        scaling, head = getattr(module, "scaling", None), getattr(module, "head_dim", None)
        if isinstance(scaling, float) and isinstance(head, int) and abs(scaling * head**0.5 - 1) > 1e-6:
            raise CheckpointError(
                f"the nemotron-nas layout scales attention by head_dim ** -0.5; {path}.scaling is {scaling:g}"
            )
