"""`recover`: what is learned is kept only where it helps, and a run that stops goes on as if it had not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fxfusion
from fxfusion.errors import FxFusionError, OptionError, SurgeryError
from fxfusion.recovery.distil import Step
from fxfusion.recovery.recover import recover
from fxfusion.recovery.student import Training
from tests.fxfusion.recovery.own_text import PLAN, is_same, model_of, own_text, state

CHOSEN = {"steps": 12, "every": 4, "learning_rate": 2e-3}


def fused(dtype: torch.dtype = torch.float32) -> Any:
    return fxfusion.fuse(model_of(), PLAN).to(dtype)


def kl(model: Any, batches: Any) -> float:
    found = fxfusion.evaluate(model, batches, model_of(), resamples=100).kl
    assert found is not None
    return float(found)


def fresh_text() -> tuple[Tensor, ...]:
    """Text that neither training nor validation saw."""
    return own_text(batches=2, seed=7)


@pytest.mark.parametrize(
    "how",
    [{}, {"lora": 4, "learning_rate": 1e-2}, {"gradient_checkpointing": True, "precision": "bfloat16"}],
    ids=["all weights", "adapters", "checkpointed, in bfloat16"],
)
def test_the_model_predicts_more_like_the_intact_one(how: dict[str, Any]) -> None:
    model, seen = fused(), list[Step]()
    names, flags = list(model.state_dict()), [value.requires_grad for value in model.parameters()]
    before = kl(model, fresh_text())
    found = recover(model, own_text(), model_of(), **CHOSEN | how, on_step=seen.append)
    assert found is model and list(model.state_dict()) == names and not model.training
    assert [value.requires_grad for value in model.parameters()] == flags
    assert kl(model, fresh_text()) < 0.9 * before
    assert [step.step for step in seen] == list(range(1, 13))
    assert [step.step for step in seen if step.validation is not None] == [4, 8, 12]
    entry = model.config.fxfusion["recovered"]
    assert entry["kl_after"] < entry["kl_before"] and entry["steps"] == 12
    assert entry["kl_after"] == pytest.approx(min(step.validation for step in seen if step.validation), rel=1e-2)


def test_half_precision_weights_stay_what_they_are() -> None:
    model = fused(torch.bfloat16)
    before = kl(model, fresh_text())
    recover(model, own_text(), model_of(), **CHOSEN)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16} and kl(model, fresh_text()) < before


def test_adapters_stay_where_they_are_not_merged() -> None:
    model = fused()
    before = {name: value for name, value in state(model).items() if "gate_proj" in name}
    found = recover(model, own_text(), model_of(), lora=4, merge=False, **CHOSEN)
    assert found.get_base_model() is model and any("lora_A" in name for name in found.state_dict())
    now = {name.replace(".base_layer", ""): value for name, value in state(model).items()}
    assert all(torch.equal(now[name], value) for name, value in before.items()), "weights did not learn"


def test_the_loss_is_the_divergence_of_the_definition() -> None:
    from fxfusion.recovery.distil import divergence

    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    theirs[0, 0, 1] = -torch.inf  # a token that the reference never says
    counted = torch.tensor([[True, False, True], [True, True, False]])
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    rows = [
        sum(float(a * (a / b).log()) for a, b in zip(p[i, j], q[i, j], strict=True) if a)
        for i, j in counted.nonzero().tolist()
    ]
    found = divergence(ours, theirs, counted)
    assert float(found) == pytest.approx(sum(rows) / 4, rel=1e-5)
    found.backward()
    assert ours.grad is not None and ours.grad.isfinite().all() and not ours.grad[0, 1].any()


def stop_after(number: int) -> Any:
    def tell(step: Step) -> None:
        if step.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    return tell


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(tmp_path: Path, lora: int | None) -> None:
    model = fused()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        recover(model, own_text(), model_of(), **CHOSEN, lora=lora, cache=tmp_path / "c", on_step=stop_after(5))
    assert is_same(model, before), "the model itself waits for the end"
    assert json.loads((tmp_path / "c" / "recover.json").read_text())["step"] == 5
    rest: list[Step] = []
    recover(model, own_text(), model_of(), **CHOSEN, lora=lora, cache=tmp_path / "c", on_step=rest.append)
    assert [step.step for step in rest] == list(range(6, 13))
    whole = recover(fused(), own_text(), model_of(), **CHOSEN, lora=lora)
    assert is_same(model, state(whole)) and not is_same(model, before)
    again = recover(fused(), own_text(), model_of(), **CHOSEN, lora=lora, cache=tmp_path / "c", on_step=rest.append)
    assert is_same(again, state(whole)) and len(rest) == 7, "nothing is done twice"
    assert len(list((tmp_path / "c").glob("*.safetensors"))) == 1


def test_what_does_not_help_is_not_kept() -> None:
    model = fused()
    before = state(model)
    with pytest.warns(UserWarning, match="nothing was better than the start.*KL .* rate of up to 5;"):
        recover(model, own_text(), model_of(), steps=2, every=1, learning_rate=5.0, clip=1e6)
    assert is_same(model, before) and "recovered" not in model.config.fxfusion


def test_a_loss_that_is_not_finite_is_an_error_and_changes_nothing() -> None:
    model, teacher = fused(), model_of()
    before = state(model)
    batches = own_text()

    def poison(step: Step) -> None:
        with torch.no_grad():
            teacher.get_output_embeddings().weight[0, 0] = torch.nan

    with pytest.raises(FxFusionError, match=r"step 2: the loss on batch \d is nan"):
        recover(model, batches, teacher, **CHOSEN, on_step=poison)
    assert is_same(model, before) and not model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number from 1"),
        ({"lora": 0}, "lora: expected a whole number from 1"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number from 0"),
        ({"learning_rate": 0.0}, "learning_rate: nothing is learned with 0"),
        ({"warmup": 2}, "warmup: expected a number from 0 to 1"),
        ({"clip": 0.0}, "clip: nothing is learned with 0"),
        ({"precision": "half"}, "precision: expected one of auto, float32"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        recover(fused(), own_text(), model_of(), **options)


def test_what_cannot_be_learned_from(tmp_path: Path) -> None:
    import peft

    model = fused()
    before = state(model)
    with pytest.raises(OptionError, match="reference: it is the model itself"):
        recover(model, own_text(), torch.compile(model))
    noise = [torch.randint(3, 97, (16, 24), generator=torch.Generator().manual_seed(n)) for n in range(6)]
    with pytest.raises(OptionError, match="the intact model's loss on this text .* noise"):
        recover(model, noise, model_of(), **CHOSEN)
    assert is_same(model, before)
    recover(model, own_text(), model_of(), steps=1, cache=tmp_path)
    with pytest.raises(OptionError, match="holds another measurement .*steps is 1, here it is 2"):
        recover(fused(), own_text(), model_of(), steps=2, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(OptionError, match=r"recover_\w+.safetensors does not belong to it, or was damaged"):
        recover(fused(), own_text(), model_of(), steps=1, cache=tmp_path)
    with pytest.raises(SurgeryError, match="has adapters: merge them first"):
        recover(peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])), own_text(), model_of())


def test_the_rate_rises_and_falls() -> None:
    training = Training(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [training.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0 == max(rates)
    assert all(one > two for one, two in zip(rates[10:], rates[11:], strict=False))
    assert rates[55] == pytest.approx(0.55) and 0.1 < rates[99] < 0.101
    assert Training(steps=1, warmup=0.0).rate(0) == Training(steps=1).top_rate


def test_what_is_computed_in() -> None:
    assert Training(steps=1).autocast(torch.float32) is None
    assert Training(steps=1).autocast(torch.bfloat16) is torch.bfloat16
    assert Training(steps=1, precision="float32").autocast(torch.bfloat16) is None
    assert Training(steps=1, precision="bfloat16").autocast(torch.float32) is torch.bfloat16
