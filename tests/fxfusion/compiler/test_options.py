"""Options of the backend: every wrong one is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxfusion import FusionPlan, FusionPolicy, ffn_fusion
from fxfusion.compiler.options import BackendOptions
from fxfusion.errors import OptionError, PlanError
from tests.helpers import stack, tokens


def test_defaults() -> None:
    options = BackendOptions.parse(None, None)
    assert options == BackendOptions(
        choice=FusionPolicy(), compiler="inductor", mode=None, inductor={}, verify="structure", strict=False
    )
    assert BackendOptions.parse({}, "default").mode is None
    assert options.paranoid_calls == 3
    assert BackendOptions.parse({"verify": "paranoid", "paranoid_calls": 7}, None).paranoid_calls == 7


def test_everything_at_once() -> None:
    given = {
        "plan": {"groups": [[1, 2]], "norm": "last"},
        "compiler": "inductor",
        "mode": "max-autotune",
        "inductor": {"epilogue-fusion": True},
        "verify": "numeric",
        "strict": True,
    }
    options = BackendOptions.parse(given, None)
    assert options.choice == FusionPlan(groups=[[1, 2]], norm="last")
    assert (options.mode, options.inductor) == ("max-autotune", {"epilogue_fusion": True})
    assert (options.verify, options.strict) == ("numeric", True)
    assert BackendOptions.parse({"policy": "paper"}, "reduce-overhead").mode == "reduce-overhead"
    assert BackendOptions.parse({"mode": "reduce-overhead"}, "reduce-overhead").mode == "reduce-overhead"


WRONG = [
    ({"polcy": "paper"}, "unknown option 'polcy'; options are: policy, plan"),
    ({"policy": "papr"}, "policy: no preset 'papr'; known presets: maximal, paper"),
    ({"policy": {"keep_lst": 1}}, "policy: unknown field 'keep_lst' \\(known: include_leading"),
    ({"policy": {"keep_last": -1}}, "policy: keep_last"),
    ({"policy": 3}, "policy: expected a preset name or a dict of fields, got int"),
    ({"policy": "paper", "plan": {"groups": [[1, 2]]}}, "policy and plan were both given"),
    ({"compiler": "gcc"}, "compiler: Input should be 'inductor', 'aot_eager' or 'eager', got 'gcc'"),
    ({"mode": "fast"}, "mode: expected one of .*'reduce-overhead'.*, got 'fast'"),
    ({"verify": True}, "verify: Input should be 'off', 'structure', 'numeric' or 'paranoid', got True"),
    ({"verify": "paranoid", "paranoid_calls": 0}, "paranoid_calls: Input should be greater than or equal to 1, got 0"),
    ({"verify": "paranoid", "paranoid_calls": True}, "paranoid_calls: Input should be a valid integer, got True"),
    (
        {"verify": "numeric", "paranoid_calls": 2},
        "paranoid_calls: only verify='paranoid' takes it, verify is 'numeric'",
    ),
    ({"strict": "yes"}, "strict: Input should be a valid boolean, got 'yes'"),
    ({"inductor": ["freezing"]}, "inductor: expected a dict of Inductor config keys, got list"),
    ({"inductor": {"epilogue_fussion": True}}, "inductor: 'epilogue_fussion' is no Inductor config key"),
    ({"inductor": {"freezing": True}}, "inductor: freezing bakes weights"),
    ({"compiler": "eager", "mode": "max-autotune"}, "mode: only compiler='inductor' takes it"),
    ({"compiler": "eager", "inductor": {"max_autotune": True}}, "inductor: only compiler='inductor'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BackendOptions.parse(options, None)


def test_mode_given_twice() -> None:
    with pytest.raises(OptionError, match="mode was given twice"):
        BackendOptions.parse({"mode": "max-autotune"}, "reduce-overhead")


def test_wrong_plans_are_plan_errors() -> None:
    with pytest.raises(PlanError, match="plan: expected a FusionPlan or a dict, got int"):
        BackendOptions.parse({"plan": 3}, None)
    with pytest.raises(PlanError, match="unknown field 'grups'"):
        BackendOptions.parse({"plan": {"grups": []}}, None)


@pytest.mark.parametrize(("options", "message"), WRONG[:6])
def test_the_user_of_torch_compile_sees_the_same(options: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    run = torch.compile(stack(count=1), backend=ffn_fusion, options=options)
    with pytest.raises(OptionError, match=message):
        run(tokens())
