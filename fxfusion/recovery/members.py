"""The parameters that a refit changed, by the names and in the shapes of the model as it was loaded.

model.layers.4.mlp.down_proj of a fused group 4 5 6  ->  ...4.mlp.down_proj.weight, ...5..., ...6...
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fxfusion.errors import SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import read_refit
from fxfusion.models.ffn_surgery.record import fused_state
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors


def refitted_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values, one after the other. Put into the model as it was loaded, they make what fuses to this one.

    Raises `SurgeryError` where the model was not refitted.
    """
    bare = bare_model(model)
    record = read_refit(getattr(bare, "config", None))
    if record is None:
        raise SurgeryError("the model was not refitted")
    names = _names(bare, tuple(fit.name for fit in record.fits if fit.applied))
    for name, value in unfused_tensors(bare):
        if name in names:
            yield name, value


def _names(model: nn.Module, layers: tuple[str, ...]) -> set[str]:
    state = fused_state(model)
    own = {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{one}." for one in layers))}
    own |= {name for name, _ in model.named_parameters() if name in layers}
    if state is None:
        return own
    found = {state.recipe.unfused_name(name) for name in own}
    for group in state.recipe.parts:
        if group.home.down.weight in found:
            downs = [member.down for member in group.members]
            found |= {name for down in downs for name in (down.weight, down.bias) if name is not None}
    return found
