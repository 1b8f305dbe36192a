"""member_index: FFNs by number and by path, and why a name means none."""

from __future__ import annotations

import pytest

from fxfusion.errors import Refusal, RefusalCode, Refused
from fxfusion.passes.member_index import MemberIndex
from tests.helpers import match, stack, tokens

REFUSED = (
    Refusal(code=RefusalCode.TOKEN_MIXING, message="attention", layer="layers.7"),
    Refusal(code=RefusalCode.OUTPUT_NORM, message="a norm", layer="layers.7"),
    Refusal(code=RefusalCode.TOKEN_MIXING, message="attention", layer="layers.8"),
    Refusal(code=RefusalCode.TOKEN_MIXING, message="a scan", layer="layers.8"),
)


def index() -> MemberIndex:
    return MemberIndex(match(stack(count=3), tokens()).ffns, REFUSED)


def test_by_number_and_by_path() -> None:
    found = index()
    assert found.one(1) is found.one("layers.1.ffn") is not found.one(2)
    assert found.holds_any([9, 2]) and not found.holds_any([9, "layers.9.ffn"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (9, "9 holds no FFN of this graph; FFNs were found in layers [0, 1, 2]"),
        (7, "(output_norm: a norm)"),
        (8, "(token_mixing: a scan)"),
        (
            "layers.7",
            "'layers.7' holds no FFN of this graph; FFNs were found in layers [0, 1, 2] (output_norm: a norm)",
        ),
    ],
)
def test_a_name_that_means_none(name: int | str, message: str) -> None:
    with pytest.raises(Refused) as found:
        index().one(name)
    assert str(found.value).endswith(message)


def test_a_group_that_is_not_here() -> None:
    assert index().absent("group 3", [8, 9]).startswith("group 3 [8, 9]: none of them holds an FFN of this graph; FFNs")
