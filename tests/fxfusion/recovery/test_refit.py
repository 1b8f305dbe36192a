"""refit of last layers: the solution against one made by hand with hooks, what it leaves alone, and going on.

And what a refit changed, by the names of the model as it was loaded.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfusion
from fxfusion.errors import FxFusionError, OptionError, SurgeryError
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.recovery.refit import _Ticks, refitted_parameters
from tests.end_to_end.caching import off, recomputed, token_ids
from tests.fxfusion.recovery.own_text import DROPPED, PLAN, is_same, model_of, own_text, state

SHARE = 0.01


def loss(model: nn.Module) -> float:
    return float(fxfusion.evaluate(model, own_text(seed=7), resamples=100).loss)


def refitted(model: Any = None, **more: Any) -> Any:
    more = {"reference": "intact", "sides": "out", "penalties": (SHARE,), **more}
    return fxfusion.refit(model or model_of(), more.pop("plan", PLAN), own_text(), **more)


def layer_outputs(model: Any, ids: Tensor, layer: int) -> Tensor:
    """The stream after a decoder layer, by a hook."""
    found = []
    hook = model.model.layers[layer].register_forward_hook(
        lambda module, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    model(ids)
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1])


def down_inputs(model: Any, ids: Tensor, layer: int) -> Tensor:
    found = []
    hook = model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0])
    )
    model(ids)
    hook.remove()
    return found[0].reshape(-1, found[0].shape[-1])


@torch.no_grad()
def by_hand(intact: Any, share: float, reference: Any) -> Tensor:
    """The group's down projection: argmin |H W^T - D|^2 + penalty |W - W0|^2, by stacked least squares."""
    fused = fxfusion.fuse(copy.deepcopy(intact), PLAN)
    own = fused.model.layers[1].mlp.down_proj.weight.double()
    ids = [batch for number, batch in enumerate(own_text()) if number != 5]  # of six batches the last one decides
    inputs = torch.cat([down_inputs(fused, batch, 1) for batch in ids]).double()
    streams = [(layer_outputs(reference, batch, 2), layer_outputs(fused, batch, 0)) for batch in ids]
    target = torch.cat([after - before for after, before in streams]).double()
    penalty = share * inputs.square().sum(0).mean()
    root = penalty.sqrt() * torch.eye(inputs.shape[1]).double()
    stacked = torch.cat([inputs, root]), torch.cat([target, penalty.sqrt() * own.t()])
    return torch.linalg.lstsq(*stacked).solution.t()


@pytest.mark.parametrize("reference", ["intact", "unfused"])
def test_the_solution_is_that_of_the_formula(reference: str) -> None:
    """Layer 1 has no attention left, so the stream before its FFN is the stream after layer 0."""
    intact = model_of()
    other = intact if reference == "intact" else fxfusion.drop_attention(model_of(), DROPPED)
    found = refitted(reference=reference, later="none").model.layers[1].mlp.down_proj.weight.double()
    wanted = by_hand(intact, SHARE, other)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    assert (found - by_hand(intact, 3 * SHARE, other)).norm() > 1e-3 * wanted.norm(), "another penalty was not noticed"


def test_loss_falls_and_the_model_stays_as_it_was() -> None:
    model = model_of()
    before = state(model)
    fused = fxfusion.fuse(model_of(), PLAN)
    done: list[tuple[str, bool]] = []
    found = refitted(model, on_layer=lambda layer, fit: done.append((layer.name, fit.applied)))
    assert is_same(model, before) and found is not model and not hasattr(model.config, "fxfusion")
    assert loss(found) < loss(fused) - 0.01
    assert [name for name, _ in done] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
    ]
    ids = token_ids()
    assert found.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, ids.shape[1] + 2)


def test_what_was_done_is_recorded() -> None:
    found = refitted(penalties=(1e-3, 0.1), later="ffn")
    record = plan_of(found).refit
    assert record is not None and (record.reference, record.later) == ("intact", "ffn")
    assert record.tokens == 5 * 16 * 24 and record.held_out_tokens == 16 * 24
    assert [fit.layers for fit in record.fits] == [(1, 2), (3,)]
    assert all(fit.after < fit.before and fit.penalty in (1e-3, 0.1) for fit in record.fits if fit.applied)
    assert record.loss_after < record.loss_before
    assert found.config.fxfusion["refit"]["tokens"] == record.tokens
    assert plan_of(fxfusion.unfuse(found)).refit == record


def test_a_plan_that_only_drops_can_be_refitted() -> None:
    plan = {"dropped_attention": DROPPED}
    found = refitted(plan=plan, later="ffn")
    assert loss(found) < loss(fxfusion.drop_attention(model_of(), DROPPED)) - 0.01
    record = plan_of(found).refit
    assert record is not None and [fit.layers for fit in record.fits] == [(1,), (2,), (3,)]


@pytest.mark.slow
@torch.no_grad()
def test_what_stands_before_and_behind_a_removed_layer_is_refitted() -> None:
    """The FFN before it stands in for it, by a solution by hand; numbers are those of the model as loaded."""
    plan = {"removed": [1]}
    found = refitted(plan=plan)
    record = plan_of(found).refit
    assert record is not None and plan_of(found).removed == (1,)
    assert [fit.layers for fit in record.fits] == [(0,), (2,), (2,), (3,), (3,)]
    assert record.loss_after < record.loss_before
    smaller, intact = fxfusion.fuse(model_of(), plan), model_of()
    assert loss(found) < loss(smaller) - 0.01

    def seen(model: Any, path: str, ids: Tensor) -> Tensor:
        kept: list[Tensor] = []
        hook = model.get_submodule(path).register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        model(ids)
        hook.remove()
        return kept[0].reshape(-1, kept[0].shape[-1]).double()

    ids = [batch for number, batch in enumerate(own_text()) if number != 5]  # of six batches the last one decides
    inputs = torch.cat([seen(smaller, "model.layers.0.mlp.down_proj", one) for one in ids])
    wanted = torch.cat([seen(intact, "model.layers.2.input_layernorm", one) for one in ids])
    lacks = wanted - torch.cat([seen(smaller, "model.layers.0.post_attention_layernorm", one) for one in ids])
    own = smaller.model.layers[0].mlp.down_proj.weight.double()
    root = (SHARE * inputs.square().sum(0).mean()).sqrt()
    stacked = (torch.cat([inputs, root * torch.eye(inputs.shape[1]).double()]), torch.cat([lacks, root * own.t()]))
    expected = torch.linalg.lstsq(*stacked).solution.t()
    weight = found.model.layers[0].mlp.down_proj.weight.double()
    assert (weight - expected).norm() <= 1e-4 * expected.norm() < (own - expected).norm()


@pytest.mark.slow
def test_the_last_layers_can_be_removed_and_made_up_for() -> None:
    plan = {"removed": [2, 3]}
    found = refitted(plan=plan)
    record = plan_of(found).refit
    assert record is not None and [fit.layers for fit in record.fits] == [(1,)]
    assert loss(found) < loss(fxfusion.fuse(model_of(), plan)) - 0.01


def test_a_plan_that_removes_needs_the_intact_model_and_later_layers() -> None:
    for more in ({"reference": "unfused"}, {"later": "none"}):
        with pytest.raises(OptionError, match="only drops attention or removes layers"):
            refitted(plan={"removed": [1]}, **more)


def note_parts(parts: list[int], layer: Any, fit: Any) -> None:
    parts.append(fit.parts)


@pytest.mark.slow
def test_a_small_memory_limit_solves_in_parts_and_comes_near() -> None:
    errors = {}
    for limit in (None, 400_000):
        parts: list[int] = []
        found = refitted(later="none", memory_limit=limit, on_layer=partial(note_parts, parts))
        record = plan_of(found).refit
        assert record is not None
        errors[limit], (count,) = record.fits[0].after, parts
        assert (count > 1) == (limit is not None)
    before = record.fits[0].before
    assert errors[None] <= errors[400_000] < before - 0.5 * (before - errors[None])


def test_what_does_not_improve_validation_is_not_applied() -> None:
    """Text for validation that has nothing to do with the text that was fitted to."""
    one = own_text()[0][:1, :6]
    with pytest.warns(UserWarning, match="calibration tokens are few"):
        found = fxfusion.refit(model_of(), PLAN, [one], validation=own_text(seed=3)[:1], penalties=(1e-9,))
    assert is_same(found, state(fxfusion.fuse(model_of(), PLAN)))
    record = plan_of(found).refit
    assert record is not None and not any(fit.applied for fit in record.fits)
    assert record.loss_after == record.loss_before


def test_a_window_whose_attention_goes_first_is_refitted() -> None:
    """The target is the stream after the window's last layer; what stands before the wide FFN has its attentions in."""
    plan = {"groups": [{"members": [1, 2], "mixers": "hoist"}]}
    found = refitted(plan=plan)
    assert loss(found) < loss(fxfusion.fuse(model_of(), plan))
    record = plan_of(found).refit
    assert record is not None
    assert [(fit.name.rsplit(".")[-2:][0], fit.layers) for fit in record.fits] == [
        ("self_attn", (1,)),
        ("mlp", (1, 2)),
        ("self_attn", (3,)),
        ("mlp", (3,)),
    ]
    assert record.fits[1].applied and not record.fits[0].applied  # nothing before the window is off


@pytest.mark.slow
def test_an_interrupted_refit_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, whole = model_of(), state(refitted())
    before = state(model)
    seen: list[str] = []

    def stop(layer: Any, fit: Any) -> None:
        seen.append(layer.name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refitted(model, cache=tmp_path, on_layer=stop)
    assert is_same(model, before)
    rest: list[str] = []
    found = refitted(model, cache=tmp_path, on_layer=lambda layer, fit: rest.append(layer.name))
    assert len(seen) == 2 and len(rest) == 1
    assert is_same(found, whole)
    with pytest.raises(OptionError, match="penalties is"):
        refitted(model, cache=tmp_path, penalties=(0.5,))
    next(tmp_path.glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(OptionError, match="does not belong to it, or was damaged"):
        refitted(model, cache=tmp_path)


def test_a_model_whose_values_are_not_finite() -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite"), pytest.raises(FxFusionError, match="loss .* is not finite"):
        refitted(model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(reference="other"), OptionError, "reference: expected one of"),
        (dict(later="some"), OptionError, "later: expected one of"),
        (dict(sides="in"), OptionError, "sides: expected one of"),
        (dict(penalties=()), OptionError, "penalties: expected positive"),
        (dict(penalties=(0.0,)), OptionError, "penalties: expected positive"),
        (dict(memory_limit=100), OptionError, "memory_limit: model.layers.1.mlp.down_proj takes at least"),
        (dict(plan={}), OptionError, "fuses nothing"),
        (dict(plan={"dropped_attention": [1]}, later="none"), OptionError, "fuses nothing"),
    ],
)
def test_bad_options(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refitted(**change)


@pytest.mark.slow
def test_models_that_were_changed_before() -> None:
    with pytest.raises(SurgeryError, match="fused already"):
        refitted(fxfusion.fuse(model_of(), PLAN))
    with pytest.raises(SurgeryError, match="refitted already"):
        refitted(refitted(later="none"))
    dropped = fxfusion.drop_attention(model_of(), DROPPED)
    with pytest.raises(SurgeryError, match="no intact model to refit to"):
        refitted(dropped)
    found = refitted(dropped, reference="unfused", later="none")
    assert is_same(found, state(refitted(reference="unfused", later="none")))


WIDE = {"groups": [{"members": [1, 2], "mixers": "wide"}]}


@pytest.mark.parametrize("later", ["all", "none"])
def test_a_wide_block_is_refitted(later: str) -> None:
    """Its attention to what the attentions of its layers add, its FFN to the stream after its last layer."""
    found = refitted(plan=WIDE, later=later)
    assert loss(found) < loss(fxfusion.fuse(model_of(), WIDE))
    record = plan_of(found).refit
    assert record is not None
    block = [("model.layers.1.self_attn.o_proj", (1, 2)), ("model.layers.1.mlp.down_proj", (1, 2))]
    rest = [("model.layers.2.self_attn.o_proj", (3,)), ("model.layers.2.mlp.down_proj", (3,))]
    assert [(fit.name, fit.layers) for fit in record.fits] == block + (rest if later == "all" else [])
    assert record.fits[0].applied and record.fits[0].after < record.fits[0].before
    assert record.fits[1].applied and record.fits[1].after < record.fits[1].before


def test_a_refitted_wide_block_is_saved_and_comes_apart(tmp_path: Path) -> None:
    found = refitted(plan=WIDE)
    with pytest.warns(UserWarning, match="no tokenizer"):
        fxfusion.save_pretrained(found, tmp_path, format="canonical")
    back = fxfusion.from_pretrained(tmp_path)
    assert loss(back) == pytest.approx(loss(found), abs=1e-5)
    fxfusion.unfuse(back)
    assert loss(fxfusion.fuse(back, WIDE)) == pytest.approx(loss(found), abs=1e-5)


def refitted_family(family: str = "llama", **more: object) -> nn.Module:
    found: nn.Module = fxfusion.refit(
        model_of(family), PLAN, own_text(family), "intact", later="ffn", sides="out", penalties=(0.01,), **more
    )
    return found


@pytest.mark.parametrize("form", ["canonical", "nemotron-nas"])
@pytest.mark.slow
def test_folders_give_the_refitted_model_back(form: str, tmp_path: Path) -> None:
    found = refitted_family()
    fxfusion.save_pretrained(found, tmp_path / "out", form)  # type: ignore[arg-type]
    loaded = fxfusion.from_pretrained(tmp_path / "out")
    assert off(recomputed(loaded, token_ids()), recomputed(found, token_ids())) < 1e-5
    assert "refitted in closed form" in (tmp_path / "out" / "README.md").read_text()
    if form == "canonical":
        assert plan_of(loaded).refit == plan_of(found).refit is not None
        with pytest.warns(UserWarning, match="refitted for its fused form"):
            fxfusion.from_pretrained(tmp_path / "out", fused=False)


def test_biases_and_transposed_weights_are_refitted_and_saved(tmp_path: Path) -> None:
    found = refitted_family("gpt2")
    names = [name for name, _ in refitted_parameters(found)]
    assert {f"transformer.h.{layer}.mlp.c_proj.{kind}" for layer in (1, 2) for kind in ("weight", "bias")} <= {*names}
    fxfusion.save_pretrained(found, tmp_path / "out")
    loaded = fxfusion.from_pretrained(tmp_path / "out")
    assert off(recomputed(loaded, token_ids()), recomputed(found, token_ids())) < 1e-5


def test_a_model_that_was_not_refitted_has_none() -> None:
    with pytest.raises(SurgeryError, match="not refitted"):
        list(refitted_parameters(model_of()))


def test_progress_counts_as_many_batches_as_were_announced() -> None:
    told: list[int] = []
    ticks = _Ticks(told.append)
    for needed in (5, 1):  # more than the three that were announced, and fewer
        with ticks.at_most(3):
            for _ in range(needed):
                ticks.tick(1)
        assert sum(told) == 3
        told.clear()
