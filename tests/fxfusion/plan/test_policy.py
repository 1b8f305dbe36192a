"""FusionPolicy: presets, fields, errors that name the field."""

from __future__ import annotations

from typing import Any

import pytest

from fxfusion import FusionPolicy
from fxfusion.errors import OptionError
from fxfusion.plan.policy import PRESETS


def test_presets() -> None:
    assert FusionPolicy.resolve(None) == FusionPolicy.resolve("maximal") == FusionPolicy()
    assert FusionPolicy.resolve("paper") == FusionPolicy(include_leading=False, keep_last=1, norm="last")
    assert set(PRESETS) == {"maximal", "paper"}


def test_defaults_are_those_that_the_guide_states() -> None:
    found = FusionPolicy().model_dump()
    assert {key: found[key] for key in ("include_leading", "keep_last", "min_members", "norm")} == {
        "include_leading": True,
        "keep_last": 0,
        "min_members": 2,
        "norm": "fold",
    }
    assert found["max_members"] is None and found["max_width"] is None


def test_dicts_and_policies_are_taken_as_they_are() -> None:
    policy = FusionPolicy(keep_last=2)
    assert FusionPolicy.resolve(policy) is policy
    assert FusionPolicy.resolve({"keep_last": 2}) == policy
    with pytest.raises(Exception, match="frozen"):
        policy.keep_last = 3  # type: ignore[misc]


def test_a_window_is_hoisted_unless_it_says_otherwise() -> None:
    given = [[5, 4], ["a.1", "a.2"], {"members": [6, 7], "mixers": "wide"}, {"members": [8, 9]}]
    windows = FusionPolicy.resolve({"windows": given}).windows
    assert [list(window) for window in windows] == [[4, 5], ["a.1", "a.2"], [6, 7], [8, 9]]
    assert [window.mixers for window in windows] == ["hoist", "hoist", "wide", "hoist"]
    assert FusionPolicy(windows=windows) == FusionPolicy.resolve({"windows": given}) != FusionPolicy()
    assert FusionPolicy().windows == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_last": -1}, "keep_last"),
        ({"min_members": 1}, "min_members"),
        ({"max_members": 1}, "max_members"),
        ({"max_width": 0}, "max_width"),
        ({"norm": "first"}, "norm"),
        ({"keep_last": "many"}, "keep_last"),
        ({"include_leading": []}, "include_leading"),
        ({"windws": ()}, "unknown field 'windws'"),
        ({"windows": 3}, "windows: Input should be a valid tuple, got 3"),
        ({"windows": [[1]]}, r"windows\[0\]: window 0 has 1 member; a window needs at least two"),
        ({"windows": [[1, 2], [2, 3]]}, r"windows\[1\]: layer 2 is in window 0 and again in window 1"),
        ({"windows": [{"members": [1, 2], "mixers": "none"}]}, r"windows\[0\].mixers: a window moves mixers"),
        ({"windows": [{"members": [1, -2]}]}, r"windows\[0\].members\[1\]: layer -2 is negative"),
        ({"keep_last": -1, "norm": "first"}, "keep_last.*norm"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"policy: .*{message}"):
        FusionPolicy.resolve(fields)
