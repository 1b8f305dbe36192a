"""Carry the LoRA adapters of a group's members over to the wide FFN.

Before:  lora.Linear around gate_proj, up_proj, down_proj of layers 4, 5, 6          ranks 8, 8, 16
After:   lora.Linear around the wide gate_proj, up_proj, down_proj of layer 4        rank 32

Everything is read, computed and checked before the model is changed; putting it on cannot fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.adapters.lora import LowRank, widened
from fxfusion.models.adapters.wrappers import MERGE_FIRST, Wrapper
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Matrix, Tensors


@dataclass(slots=True)
class Carried:
    """One wide layer: its wrapper, of the first member that has one, and its adapters by name. `donors`: the members'
    wrappers, None where a member has none."""

    wrapper: Wrapper
    adapters: Mapping[str, LowRank]
    donors: Sequence[Wrapper | None]

    def put_on(self, model: nn.Module, path: str) -> None:
        """Around the wide module, which has this path by now."""
        holder = model.get_submodule(path.rpartition(".")[0])
        layer, name = self.wrapper.module, path.rpartition(".")[2]
        layer.base_layer = holder._modules[name]
        for adapter, update in self.adapters.items():
            given = [donor.module for donor in self.donors if donor is not None and adapter in donor.module.lora_A]
            _set_adapter(layer, adapter, update, given)
        holder._modules[name] = layer


def carry(recipe: GroupRecipe, wrappers: Mapping[str, Wrapper], tensors: Tensors, check: bool) -> dict[str, Carried]:
    """The wide layers that get an adapter, by the path of the first member's module.

    `wrappers`: by path, taken off; `tensors`: the members' parameters by name. Raises `SurgeryError` where an adapter
    of the group cannot be carried exactly.
    """
    linear = {_owner(matrix) for member in recipe.members for matrix in member.matrices}
    for path, wrapper in wrappers.items():
        if path not in linear and any(name.startswith(f"{path}.") for name in recipe.reads):
            raise SurgeryError(f"{path}: {type(wrapper.module).__name__} cannot be carried over: {MERGE_FIRST}")
    found = {}
    for number in range(len(recipe.home.matrices)):
        matrices = [member.matrices[number] for member in recipe.members]
        donors = [wrappers.get(_owner(matrix)) for matrix in matrices]
        present = [donor for donor in donors if donor is not None]
        if present:
            _check_kind(present)
            adapters = _adapters(recipe, number, donors, tensors, check)
            found[_owner(matrices[0])] = Carried(donors[0] or present[0], adapters, donors)
    return found


def _adapters(
    recipe: GroupRecipe, number: int, donors: Sequence[Wrapper | None], tensors: Tensors, check: bool
) -> dict[str, LowRank]:
    names = dict.fromkeys(name for donor in donors if donor is not None for name in donor.module.lora_A)
    found = {}
    for name in names:
        _check_settings(name, [donor for donor in donors if donor is not None and name in donor.module.lora_A])
        updates = [None if donor is None else _read(donor.module, name) for donor in donors]
        is_meta = any(update is not None and update.a.is_meta for update in updates)
        found[name] = widened(recipe, number, updates, tensors, check and not is_meta)
    return found


def _check_kind(present: Sequence[Wrapper]) -> None:
    from peft.tuners.lora.layer import Linear

    for wrapper in present:
        layer = wrapper.module
        if not isinstance(layer, Linear) or type(layer).forward is not Linear.forward:
            kind = f"{type(layer).__module__.rpartition('.')[0].rpartition('.')[2]}.{type(layer).__name__}"
            raise SurgeryError(f"{wrapper.path}: an adapter of kind {kind} cannot be carried over: {MERGE_FIRST}")
        if layer.lora_variant:
            kind = type(next(iter(layer.lora_variant.values()))).__name__.removesuffix("Variant")
            raise SurgeryError(f"{wrapper.path}: a LoRA of kind {kind} is no sum of low rank: {MERGE_FIRST}")
        if layer.merged:
            raise SurgeryError(f"{wrapper.path}: its adapter is merged for the moment: `unmerge_adapter` first")


def _check_settings(adapter: str, donors: Sequence[Wrapper]) -> None:
    """What a layer has one of must be the same in all members."""
    settings = {
        "lora_dropout": {getattr(donor.module.lora_dropout[adapter], "p", 0.0) for donor in donors},
        "use_rslora": {donor.module.use_rslora[adapter] for donor in donors},
        "active": {adapter in donor.module.active_adapters and not donor.module.disable_adapters for donor in donors},
    }
    for name, values in settings.items():
        if len(values) > 1:
            paths = ", ".join(donor.path for donor in donors)
            raise SurgeryError(f"adapter {adapter!r}: {name} differs between {paths}: {MERGE_FIRST}")


def _read(layer: Any, adapter: str) -> LowRank | None:
    if adapter not in layer.lora_A:
        return None
    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    return LowRank(a=down.weight, b=up.weight, bias=up.bias, scaling=float(layer.scaling[adapter]))


def _set_adapter(layer: Any, adapter: str, update: LowRank, given: Sequence[Any]) -> None:
    """Make this the adapter of a layer. `given`: layers of members that have it, for what is the same in all."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        values, own = getattr(given[0], attribute, None), getattr(layer, attribute, None)
        if own is not None and values is not None and adapter in values and adapter not in own:
            own[adapter] = values[adapter]
    trains = any(other.lora_A[adapter].weight.requires_grad for other in given)
    layer.lora_A[adapter] = _linear(update.a, None, trains)
    layer.lora_B[adapter] = _linear(update.b, update.bias, trains)
    layer.in_features, layer.out_features = update.a.shape[1], update.b.shape[0]
    rank = update.rank
    layer.r[adapter], layer.scaling[adapter] = rank, update.scaling
    layer.lora_bias[adapter] = update.bias is not None
    alpha = update.scaling * (rank**0.5 if layer.use_rslora[adapter] else rank)
    layer.lora_alpha[adapter] = int(alpha) if alpha == int(alpha) else alpha


def _linear(weight: Tensor, bias: Tensor | None, trains: bool) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta", dtype=weight.dtype)
    made.weight = nn.Parameter(weight, requires_grad=trains)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=trains)
    return made


def _owner(matrix: Matrix) -> str:
    return matrix.weight.rpartition(".")[0]
