"""`unfuse`: the members of each wide FFN back in layers of their own.

Before:  layer 4, its FFN as wide as four
After:   layers 4 5 6 7, each with its FFN; no attention comes back
         (of a window: layers 4 to 6, which had kept their attention, have their FFNs again; of a wide one, both)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.adapters.carrier import Adapters
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import fused_entry
from fxfusion.models.ffn_surgery.depth import DepthEditor, put_layers
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.heads import own_configs
from fxfusion.models.ffn_surgery.record import FusedState, forget_entry, fused_state, set_fused_state
from fxfusion.models.ffn_surgery.residue import Residue
from fxfusion.models.ffn_surgery.snapshot import Changes
from fxfusion.models.ffn_surgery.stubs import FfnStubs, put_modules
from fxfusion.models.ffn_surgery.unpack import Unpacking
from fxfusion.models.ffn_surgery.widen import set_parameter, tensor_of

Model = TypeVar("Model", bound=nn.Module)


def unfuse(model: Model) -> Model:
    """Give the members of all fused groups their own layers back, in place.

    Weights come back bit for bit with `norm="last"`, to rounding with `norm="fold"`; the sequential form is back too.
    Where the fused FFN was trained, the members are such that their parallel form computes what it does. Adapters of
    other modules stay.

    Raises:
        SurgeryError: the model is not fused, has an adapter on a fused FFN (merge it first), was fused in another
            process (load its checkpoint with `fxfusion.from_pretrained` instead), has lost whole layers, or was trained
            to what no members can be. The model is then as it was.
    """
    bare = bare_model(model)
    state = _state(bare)
    if state.recipe.gone:
        raise SurgeryError(
            f"layers {list(state.recipe.gone)} were removed with their weights, and cannot be given back: load the "
            "model as it was, and fuse it by the plan's groups alone"
        )
    with ExitStack() as undo:
        taken = Adapters.taken_off(model, bare, "carry", undo)
        names = (state.recipe.fused_name(name) or name for group in state.recipe.parts for name in group.writes)
        taken.refuse(names, "which no member alone could take over")
        taken.renamed = state.recipe.unfused_name
        _unfuse(bare, state)
        undo.pop_all()
    taken.put_on()
    return model


def _unfuse(model: Any, state: FusedState) -> None:
    wide = {name: value for group in state.recipe.parts for name, value in _wide(model, state, group).items()}
    for group in state.recipe.parts:  # before anything is changed
        Unpacking(group, wide, state.residue).check()
    layers = {state.recipe.kept.index(layer): layer for layer in state.recipe.kept}
    children = list(model.get_submodule(state.recipe.path).children())
    mode = children[0].training  # the model may have changed it since the shells were taken out
    shells = {layer: shell.train(mode) for layer, shell in state.shells.items()}
    by_number = {layers[place]: child for place, child in enumerate(children)} | shells
    put_layers(model, state.recipe.path, [by_number[layer] for layer in range(state.recipe.count)])
    put_modules(model, state.parts)
    _put_members(model, state.recipe.parts, state.residue)
    own_configs(model.modules())
    state.changes.undo()
    set_fused_state(model, None)
    forget_entry(model.config)


def give_back(
    model: nn.Module,
    depth: DepthEditor,
    stubs: FfnStubs,
    changes: Changes,
    groups: Sequence[GroupRecipe],
    residue: Residue,
) -> None:
    """Undo a surgery that was not finished: `groups` are those whose members are gone."""
    try:
        depth.put(depth.layers)
        stubs.give_back()
        own_configs(model.modules())
        _put_members(model, groups, residue)
    finally:
        changes.undo()


def unfused_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of a fused model under the names and in the shapes of the unfused one.

    Members are made as they are asked for, so no more than one matrix of theirs need be in memory. The model is not
    changed. A model that is not fused gives its own.
    """
    bare = bare_model(model)
    if fused_entry(getattr(bare, "config", None)) is None:
        yield from bare.state_dict(keep_vars=True).items()
        return
    state = _state(bare)
    written = {name for group in state.recipe.parts for name in group.writes}
    for name, value in bare.state_dict(keep_vars=True).items():
        own = state.recipe.unfused_name(name)
        if own not in written:
            yield own, value
    for group in state.recipe.parts:
        yield from Unpacking(group, _wide(bare, state, group), state.residue).parameters()


def _state(model: nn.Module) -> FusedState:
    state = fused_state(model)
    if state is not None:
        return state
    if fused_entry(getattr(model, "config", None)) is None:
        raise SurgeryError("the model is not fused")
    raise SurgeryError(
        "the model was fused in another process and does not know its members; "
        "`fxfusion.from_pretrained` of a canonical checkpoint gives one that does"
    )


def _wide(model: nn.Module, state: FusedState, group: GroupRecipe) -> dict[str, Tensor]:
    """The fused parameters of a group, by the first member's names in the unfused model."""
    found = {name: tensor_of(model, state.recipe.fused_name(name) or name) for name in group.writes}
    return {name: value for name, value in found.items() if value is not None}


def _put_members(model: nn.Module, groups: Sequence[GroupRecipe], residue: Residue) -> None:
    """Layers are in their places; give each member its parameters, group by group."""
    for group in groups:
        wide = {name: tensor_of(model, name) for name in group.writes}
        given = {name: value for name, value in wide.items() if value is not None}
        biases = {matrix.own_bias for matrix in group.home.matrices if matrix.bias is None}
        for name, value in Unpacking(group, given, residue).parameters():
            set_parameter(model, name, value)
        for name in biases & set(group.writes):
            set_parameter(model, name, None)
