"""Low-rank updates of members as one: against the members' own weights with their updates added by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fxfusion.errors import SurgeryError
from fxfusion.models.adapters import lora
from fxfusion.models.adapters.lora import LowRank, widened
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.layout import Matrix
from tests.fxfusion.models.ffn_surgery.hand_made import (
    Form,
    Tensors,
    fused,
    packed,
    parallel,
    parameters,
    recipe,
    stream,
)

RANKS, SCALINGS = (1, 3, 2), (2.0, 0.5, 1.0)
LIMIT, RED = 1e-12, 1e-3

FORMS = {
    "fold": Form(),
    "last": Form(norm="last"),
    "one plus weight": Form(plus_one=True),
    "chunk": Form(packed="chunk"),
    "interleaved": Form(packed="interleaved"),
    "transposed": Form(transposed=True, biases=True),
    "layer norm, last": Form(norm="last", shift=True, biases=True),
    "scales": Form(scale=True, multiplier=0.5),
    "two shards": Form(shards=2),
    "two shards, packed": Form(shards=2, packed="chunk"),
}
WITH_BIAS = {
    "biases": Form(biases=True),
    "layer norm": Form(shift=True, biases=True),
    "layer norm, packed": Form(shift=True, biases=True, packed="chunk"),
    "scales and biases": Form(biases=True, scale=True, multiplier=0.5),
}


def updates_of(
    group: GroupRecipe, number: int, tensors: Tensors, bias: bool, without: int | None
) -> list[LowRank | None]:
    generator = torch.Generator().manual_seed(number)
    found: list[LowRank | None] = []
    for place, member in enumerate(group.members):
        matrix = member.matrices[number]
        outputs, inputs = matrix.out_in(tensors[matrix.weight]).shape

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        update = LowRank(
            a=random(RANKS[place], inputs),
            b=random(outputs, RANKS[place]),
            bias=random(outputs) if bias else None,
            scaling=SCALINGS[place],
        )
        found.append(None if place == without else update)
    return found


def added(matrix: Matrix, bias_name: str, update: LowRank | None, tensors: Tensors) -> Tensors:
    """The parameters of one linear layer with the update in them."""
    if update is None:
        return {}
    change = update.scaling * update.b @ update.a
    changed = {matrix.weight: tensors[matrix.weight] + (change.t() if matrix.transposed else change)}
    if update.bias is not None:
        changed[bias_name] = tensors[bias_name] + update.scaling * update.bias
    return changed


def error(form: Form, bias: bool, without: int | None = None, lost: int | None = None) -> float:
    """What the wide FFN with wide updates is off the members with theirs. `without`: a member that has none; `lost`: a
    member whose update the reference does without."""
    group = recipe(form)
    tensors = parameters(group)
    wide, adapted = packed(group, tensors), dict(tensors)
    for number, home in enumerate(group.home.matrices):
        updates = updates_of(group, number, tensors, bias, without)
        wide |= added(home, home.own_bias, widened(group, number, updates, tensors, check=True), wide)
        for place, (member, update) in enumerate(zip(group.members, updates, strict=True)):
            if place != lost:
                adapted |= added(member.matrices[number], member.matrices[number].own_bias, update, adapted)
    wanted, found = parallel(group, adapted, stream()), fused(group, wide, stream())
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("without", [None, 0, 2])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_wide_update_is_every_members_own(form: Form, without: int | None) -> None:
    assert error(form, bias=False, without=without) < LIMIT
    assert error(form, bias=False, without=without, lost=1) > RED


@pytest.mark.parametrize("form", WITH_BIAS.values(), ids=WITH_BIAS)
def test_biases_of_updates_take_up_the_norms_bias(form: Form) -> None:
    assert error(form, bias=True) < LIMIT
    assert error(form, bias=True, lost=2) > RED


def test_equal_scalings_leave_b_bit_for_bit() -> None:
    group = recipe(Form())
    tensors = parameters(group)
    updates = [replace(update, scaling=2.0) for update in updates_of(group, 0, tensors, False, None) if update]
    wide = widened(group, 0, updates, tensors, check=True)
    assert wide.scaling == 2.0 and wide.rank == sum(RANKS)
    assert torch.equal(wide.b[4:10, 1:4], updates[1].b) and not wide.b[4:10, 4:].any()


def test_a_scaling_of_zero_stays_zero() -> None:
    group = recipe(Form())
    tensors = parameters(group)
    updates = [replace(update, scaling=0.0) for update in updates_of(group, 2, tensors, False, None) if update]
    assert not widened(group, 2, updates, tensors, check=True)(torch.ones(1, group.width, dtype=torch.float64)).any()


def test_a_norms_bias_without_a_bias_to_take_it_is_refused() -> None:
    group = recipe(Form(shift=True, biases=True))
    tensors = parameters(group)
    with pytest.raises(
        SurgeryError, match=r"1.gate.weight: its norm has a bias, .* norm='last' or with adapters='merge'"
    ):
        widened(group, 0, [None, *updates_of(group, 0, tensors, False, None)[1:]], tensors, check=True)


def test_adapters_of_different_dtypes_are_refused() -> None:
    group = recipe(Form())
    tensors = parameters(group)
    updates = updates_of(group, 0, tensors, False, None)
    assert updates[1] is not None
    updates[1] = replace(updates[1], a=updates[1].a.float(), b=updates[1].b.float())
    with pytest.raises(SurgeryError, match="0.gate.weight: the adapters of the members differ in dtype"):
        widened(group, 0, updates, tensors, check=True)


@pytest.mark.parametrize("number", [0, 2])
def test_the_proof_notices_a_wrong_update(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = recipe(Form())
    tensors = parameters(group)
    updates = updates_of(group, number, tensors, False, None)
    right = widened(group, number, updates, tensors, check=False)
    wrong = replace(right, b=right.b.roll(1, 0), a=right.a.roll(1, 1))
    monkeypatch.setattr(lora, "_wide_projection" if number == 0 else "_wide_down", lambda *_: wrong)
    with pytest.raises(SurgeryError, match="does not compute what the members' do"):
        widened(group, number, updates, tensors, check=True)
