"""Models the way users run them: attention dropped, then compiled by fxfusion. Imported when it is used."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from itertools import chain, count
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fxfusion.backend import ffn_fusion
from fxfusion.cost import interleaved
from fxfusion.models.drop_attention import drop_attention
from fxfusion.models.fingerprint import check_fits
from fxfusion.plan.fusion_plan import FusionPlan

Logits = Callable[[Tensor], Tensor]
T = TypeVar("T", bound=Callable[..., Any])
_serial = count()


def without_attention(model: PreTrainedModel, plan: FusionPlan) -> PreTrainedModel:
    """A copy on the same weights, without the attention that the plan drops.

    Raises `PlanError` where the plan was made for another model, `SurgeryError` where there is none to drop.
    """
    check_fits(plan, model)
    weights = chain(model.parameters(), model.buffers())
    copied: PreTrainedModel = copy.deepcopy(model, {id(weight): weight for weight in weights})
    return drop_attention(copied, plan.dropped_attention) if plan.dropped_attention else copied


def compiled(model: T, plan: FusionPlan, compiler: str) -> T:
    """The model compiled with exactly the plan's groups: one that cannot be had is an error at the first call."""
    options: dict[str, Any] = {"plan": plan, "compiler": compiler, "strict": True}
    return cast(T, torch.compile(model, backend=ffn_fusion, options=options, dynamic=False))


def call_of(model: nn.Module) -> Logits:
    """A function from ids `[batch, seq]` to logits, with a code object of its own.

    Dynamo keeps what it compiled by code object, and looks through all of it at each call: functions that
    are compared in speed must not share one.
    """

    def call(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits

    code = call.__code__.replace(co_name=f"model_{next(_serial)}")
    return types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)


def waited(model: Callable[[Tensor], Any], ids: Tensor) -> Callable[[], None]:
    """One call on `ids: [batch, seq]`, until its result is there."""

    def call() -> None:
        model(ids)
        if ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)

    return call


@torch.no_grad()
def compared(
    fused: Callable[[], None], others: Mapping[str, Callable[[], None]], rounds: int, seed: int
) -> dict[str, Any]:
    """Interleaved samples of calls, with the first of `others` against itself as control: `seconds` by name, and how
    many times faster the fused model is (`fused_against`), each with its interval."""
    first = next(iter(others))
    samples = interleaved.sample({"fused": fused, **others, "control": others[first]}, rounds, seed)
    return {
        "seconds": {name: interleaved.median(found) for name, found in samples.items()},
        "fused_against": {name: interleaved.ratio(samples[name], samples["fused"]).to_dict() for name in others},
        "control": interleaved.ratio(samples[first], samples["control"]).to_dict(),
    }
