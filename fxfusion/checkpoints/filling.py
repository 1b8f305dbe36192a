"""Give an empty model its tensors out of a folder, one after the other, and fused ones group by group.

plain      read -> cast -> in its place
a group    read the members -> pack -> in the first member's place -> the members are let go
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfusion.checkpoints.model_tensors import own_tensors
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.record import FusedState, fused_state
from fxfusion.models.ffn_surgery.residue import residue_of
from fxfusion.models.ffn_surgery.widen import set_parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """`stored`: names in the folder by names in the unfused model; `dtypes`: what to cast to, as stored where a name
    is not there; `device`: where the model goes; `advance`: told the bytes that were read."""

    reader: CheckpointReader
    stored: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    device: torch.device | str = "cpu"
    advance: Callable[[int], None] = lambda count: None

    def run(self, model: Any) -> None:
        """All tensors of a model: intact, without some attention, or fused on the meta device."""
        state = fused_state(model)
        for name, own in self._plain(model, state):
            set_parameter(model, name, self._read(own).to(self.device))
        if state is not None:
            self._fill_groups(model, state)
        model.tie_weights()

    def some(self, model: Any, names: Iterable[str]) -> None:
        """These tensors of an unfused model, and what is tied to them."""
        for name in names:
            set_parameter(model, name, self._read(name).to(self.device))
        model.tie_weights()

    def nbytes(self, model: Any) -> int:
        """Bytes that `run` reads."""
        state = fused_state(model)
        names = [own for _, own in self._plain(model, state)]
        if state is not None:
            names += [name for group in state.recipe.parts for name in group.reads]
        return sum(self.reader.stored[self.stored[name]].nbytes for name in names)

    def _plain(self, model: Any, state: FusedState | None) -> Iterator[tuple[str, str]]:
        """Names of what is not fused, with those in the unfused model."""
        if state is None:
            yield from ((name, name) for name in own_tensors(model))
            return
        written = {name for group in state.recipe.parts for name in group.writes}
        for name in own_tensors(model):
            own = state.recipe.unfused_name(name)
            if own not in written:
                yield name, own

    def _fill_groups(self, model: Any, state: FusedState) -> None:
        state.residue.clear()  # the meta device knew none of it
        for group in state.recipe.parts:
            members = _Members(self._read)
            state.residue.update(residue_of(group, members))
            done = _last_uses(group)
            for name, value in group.pack(members):
                set_parameter(model, state.recipe.fused_name(name) or name, value.to(self.device))
                members.forget(done.get(name, ()))

    def _read(self, name: str) -> Tensor:
        value = self.reader.read(self.stored[name])
        self.advance(value.nbytes)
        return value.to(self.dtypes.get(name, value.dtype))


class _Members(Mapping[str, Tensor]):
    """Parameters of a group's members, each read when it is first asked for."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._reading, self._held = read, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._reading(name)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._held.pop(name, None)


def _last_uses(group: GroupRecipe) -> dict[str, list[str]]:
    """For a wide parameter: the members' matrices that nothing needs once it is made."""
    found = {}
    for number, matrix in enumerate(group.home.projections):
        last = matrix.own_bias if group.in_bias else matrix.weight
        found[last] = [member.projections[number].weight for member in group.members]
    return found
