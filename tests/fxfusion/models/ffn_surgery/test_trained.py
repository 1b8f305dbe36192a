"""Members that are given back after training compute, in parallel, what the trained fused FFN computes."""

from __future__ import annotations

import pytest
import torch

from fxfusion.errors import SurgeryError
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.residue import residue_of
from fxfusion.models.ffn_surgery.unpack import Unpacking
from tests.fxfusion.models.ffn_surgery import hand_made
from tests.fxfusion.models.ffn_surgery.hand_made import Form, Tensors

LIMIT, RED = 1e-12, 1e-3

FORMS = {
    "plain": Form(),
    "last norm": Form(norm="last", shift=True, biases=True),
    "biases": Form(biases=True),
    "shifts and biases": Form(shift=True, biases=True, transposed=True),
    "one plus weight": Form(plus_one=True, shift=True, biases=True),
    "packed in halves": Form(packed="chunk", biases=True, shards=2),
    "packed in turns": Form(packed="interleaved", shift=True, biases=True, shards=3),
    "scales": Form(scale=True, biases=True),
    "multiplier": Form(multiplier=0.22, biases=True),
    "scales and multiplier": Form(scale=True, multiplier=0.5, biases=True, shift=True),
    "shards": Form(shards=2, biases=True),
}


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def given_back(group: GroupRecipe, wide: Tensors, members: Tensors) -> Tensors:
    unpacking = Unpacking(group, wide, residue_of(group, members))
    unpacking.check()
    return dict(unpacking.parameters())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_parallel_form_of_the_members_is_the_trained_ffn(form: Form) -> None:
    group, n = hand_made.recipe(form), hand_made.stream()
    members = hand_made.parameters(group)
    wide = hand_made.packed(group, members)
    assert off(hand_made.fused(group, wide, n), hand_made.parallel(group, members, n)) <= LIMIT

    trained = hand_made.trained(wide)
    wanted = hand_made.fused(group, trained, n)
    back = given_back(group, trained, members)
    assert back.keys() == members.keys()
    assert {name: value.shape for name, value in back.items()} == {name: v.shape for name, v in members.items()}
    assert off(hand_made.parallel(group, back, n), wanted) <= LIMIT
    assert off(hand_made.parallel(group, members, n), wanted) > RED
    for name in wide:  # what any one parameter became matters
        without = given_back(group, {**trained, name: wide[name]}, members)
        assert off(hand_made.parallel(group, without, n), wanted) > LIMIT * 1e3, name


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_members_come_back_as_they_were_where_nothing_was_trained(form: Form) -> None:
    group = hand_made.recipe(form)
    members = hand_made.parameters(group)
    back = given_back(group, hand_made.packed(group, members), members)
    for name, value in members.items():
        assert torch.equal(back[name], value) if form.norm == "last" else off(back[name], value) <= LIMIT, name


@pytest.mark.parametrize("plus_one", [False, True])
def test_a_channel_that_a_gain_took_out_comes_back_when_training_fills_it(plus_one: bool) -> None:
    group, n = hand_made.recipe(Form(plus_one=plus_one, shift=True, biases=True)), hand_made.stream()
    members = hand_made.parameters(group)
    nothing = -1.0 if plus_one else 0.0
    members["1.norm.weight"][[2, 4]] = nothing
    wide = hand_made.packed(group, members)
    back = given_back(group, wide, members)
    assert bool((back["1.norm.weight"][[2, 4]] == nothing).all())
    assert torch.equal(back["1.gate.weight"][:, [2, 4]], members["1.gate.weight"][:, [2, 4]])

    trained = hand_made.trained(wide, ["0.norm.weight", "0.norm.bias", "0.gate.bias"])
    trained["0.up.weight"][:, 4] += 0.1  # of two channels one
    back = given_back(group, trained, members)
    assert off(hand_made.parallel(group, back, n), hand_made.fused(group, trained, n)) <= LIMIT
    assert back["1.norm.weight"][2] == nothing and back["1.norm.weight"][4] != nothing
    assert torch.equal(back["1.gate.weight"][:, 2], members["1.gate.weight"][:, 2])


def test_a_row_that_a_scale_took_out_comes_back_when_training_fills_it() -> None:
    group, n = hand_made.recipe(Form(scale=True, biases=True)), hand_made.stream()
    members = hand_made.parameters(group)
    members["0.scale"][[1, 3]] = 0.0
    wide = hand_made.packed(group, members)
    assert torch.equal(given_back(group, wide, members)["0.down.weight"][1], members["0.down.weight"][1])

    trained = hand_made.trained(wide, ["0.scale", "0.down.bias"])
    trained["0.down.weight"][3] += 0.1
    back = given_back(group, trained, members)
    assert off(hand_made.parallel(group, back, n), hand_made.fused(group, trained, n)) <= LIMIT
    assert torch.equal(back["0.down.weight"][1], members["0.down.weight"][1])


def test_small_parameters_keep_their_own_dtype() -> None:
    group = hand_made.recipe(Form(norm="last"))
    members = hand_made.parameters(group)
    members = {name: value if "norm" in name else value.bfloat16() for name, value in members.items()}
    back = given_back(group, hand_made.packed(group, members), members)
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in members.items())


def test_a_bias_that_no_member_has_is_refused_by_name() -> None:
    group = hand_made.recipe(Form(shift=True))  # the shifts make a bias of the wide FFN
    members = hand_made.parameters(group)
    wide = hand_made.packed(group, members)
    given_back(group, wide, members)
    with pytest.raises(SurgeryError, match=r"0\.gate\.bias was trained since it was fused, and layers\.0 has no such"):
        given_back(group, hand_made.trained(wide, ["0.gate.bias"]), members)


def test_one_number_that_became_one_for_each_channel_is_refused_by_name() -> None:
    group, n = hand_made.recipe(Form(slope=True)), hand_made.stream()
    members = hand_made.parameters(group)
    wide = hand_made.packed(group, members)
    trained = hand_made.trained(wide, ["0.gate.weight"])
    back = given_back(group, trained, members)
    assert off(hand_made.parallel(group, back, n), hand_made.fused(group, trained, n)) <= LIMIT
    with pytest.raises(SurgeryError, match=r"0\.slope was one number, and training since has made it one per channel"):
        given_back(group, hand_made.trained(wide, ["0.slope"]), members)


def test_what_is_added_after_the_down_projection_comes_back_and_is_refused_once_trained() -> None:
    group, n = hand_made.recipe(Form(scale=True, offset=True, biases=True, multiplier=0.5)), hand_made.stream()
    members = hand_made.parameters(group)
    wide = hand_made.packed(group, members)
    assert off(hand_made.fused(group, wide, n), hand_made.parallel(group, members, n)) <= LIMIT
    trained = hand_made.trained(wide, ["0.down.weight", "0.down.bias"])
    back = given_back(group, trained, members)
    assert off(hand_made.parallel(group, back, n), hand_made.fused(group, trained, n)) <= LIMIT
    for name in ("0.offset", "0.scale"):
        with pytest.raises(SurgeryError, match=rf"{name} was trained since it was fused, and cannot be shared out"):
            given_back(group, hand_made.trained(wide, [name]), members)


def test_a_trained_sum_of_biases_that_no_member_has_is_refused_by_name() -> None:
    group = hand_made.recipe(Form(offset=True))
    members = hand_made.parameters(group)
    with pytest.raises(SurgeryError, match=r"0\.down\.bias was trained since it was fused, and no member has such"):
        given_back(group, hand_made.trained(hand_made.packed(group, members), ["0.down.bias"]), members)
