"""What is asked of the planner: what is filled in, and what contradicts itself."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

from fxfusion.errors import OptionError
from fxfusion.planning.budget import Budget, Limits
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.request import Request
from fxfusion.planning.sweep import sweep

OTHERS = {"model", "batches", "method", "cache", "progress", "command", "workload"}  # of no concern to a request


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"roads": ["hoist"]}, "roads: they need a budget"),
        ({"roads": ["raise"], "target_depth": 3}, "roads: expected some of drop, hoist, wide, remove"),
        ({"roads": ["hoist"], "target_depth": 3, "drop": 2}, "drop: over several roads"),
        ({"roads": ["hoist"], "target_depth": 3, "dropped_attention": [1]}, "dropped_attention: over several roads"),
        ({"roads": ["hoist"], "target_depth": 3, "splits": [1]}, "splits: over several roads"),
        ({"roads": ["hoist"], "target_depth": 3, "preset": "paper"}, "preset='paper' is a rule"),
        ({"roads": ["hoist"], "max_latency": 1.0}, "max_latency: name the device"),
        ({"drop": 2, "max_latency": 1.0}, "max_latency: name the device"),
        ({"roads": ["hoist"], "max_latency": -1.0, "hardware": "h100"}, "max_latency: expected milliseconds"),
        (
            {"roads": ["hoist"], "max_latency": 1.0, "hardware": "h100", "target_depth": 2},
            "target_depth and max_latency",
        ),
        ({"roads": ["hoist"], "max_kl": 1.0, "hardware": "abacus"}, "hardware: no device 'abacus'"),
        ({"roads": ["hoist"], "target_depth": 3, "max_dependency": 0.1}, "max_dependency"),
        ({"roads": ["hoist"], "target_depth": 3, "max_window": 1}, "max_window"),
        ({"after_refit": True, "target_depth": 3}, "after_refit: name the roads"),
        ({"max_window": 3, "target_depth": 3}, "max_window: name the roads"),
        ({"drop": 2, "hardware": "h100"}, "hardware: latency is predicted under a budget"),
        ({"target_depth": 3, "tp": 2}, "tp: name the device"),
        ({"roads": ["hoist"], "target_depth": 3, "precision": "fp8"}, "precision: name the device"),
        ({"drop": 2, "dropped_attention": [1]}, "drop and dropped_attention were both given"),
        ({"preset": "paper", "drop": 2, "max_kl": 0.1}, "max_kl: preset='paper' is a rule"),
        ({"preset": "paper", "drop": 2, "max_members": 3}, "max_members: preset='paper' is a rule"),
        ({"preset": "paper", "drop": 2, "norm": "fold"}, "norm: preset='paper' takes the norm of a group's last"),
        ({"preset": "eye"}, "expected 'paper' or 'automatic', got 'eye'"),
    ],
)
def test_what_contradicts_itself_is_refused_and_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Request.of(arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"roads": ["hoist"], "drops": [1]}, "drops: over several roads"),
        ({"roads": ["hoist"], "max_dependency": 0.1}, "max_dependency"),
        ({"after_refit": True}, "after_refit: name the roads"),
        ({"max_window": 3}, "max_window: name the roads"),
        ({"hardware": "abacus"}, "hardware: no device 'abacus'"),
    ],
)
def test_what_no_sweep_is_asked_for(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Request.of({**arguments, "every_depth": True})
    assert Request.of({"roads": "hoist", "hardware": "h100", "every_depth": True}).roads == ("hoist",)


def test_automatic_is_written_out_where_nothing_else_is_said() -> None:
    found = Request.of({"preset": "automatic"})
    assert found.roads == ("drop", "hoist") and found.after_refit and found.hardware == "h100"
    assert found.budget == Budget(max_perplexity_increase=0.01)
    said = Request.of({"preset": "automatic", "roads": ["wide"], "max_latency": 2.0, "hardware": "h200", "tp": 8})
    assert said.roads == ("wide",) and said.hardware == "h200" and said.budget == Budget(max_latency=2.0)
    assert Request.of({"preset": "automatic", "after_refit": False}).roads == ("drop", "hoist", "wide")


def test_every_argument_is_known() -> None:
    """What a request does not know, it would not check."""
    known = {each.name for kind in (Request, Budget, Limits) for each in fields(kind)}
    asked = {*inspect.signature(make_plan).parameters, *inspect.signature(sweep).parameters}
    assert asked - OTHERS <= known and known - asked == {"budget", "limits", "every_depth"}
