"""Generative probes: what is asked, and that one run says what greedy decoding would write."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fxfusion.analysis.probes import KINDS, Probe, ProbeScores, probe, probes
from fxfusion.errors import OptionError

CHARACTERS = "\n !()+=:[]{}0123456789abcdefghijklmnopqrstuvwxyz"


class ByCharacter:
    """One token a character."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [CHARACTERS.index(one) for one in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(CHARACTERS[one] for one in ids)


def knowing(asked: list[Probe], wrong: Any = lambda one: False) -> Any:
    """A model that reads text and knows the answers; of `wrong` ones it gets the last character wrong."""
    tokenizer, calls = ByCharacter(), []

    def logits(input_ids: Tensor) -> Tensor:
        calls.append(tuple(input_ids.shape))
        found = torch.zeros(*input_ids.shape, len(CHARACTERS))
        for row, ids in enumerate(input_ids.tolist()):
            text = tokenizer.decode(ids)
            for one in asked:
                if text.startswith(one.prompt):
                    answer = one.answer[:-1] + ("!" if wrong(one) else one.answer[-1])
                    for place, character in enumerate(answer, start=len(one.prompt) - 1):
                        found[row, place, CHARACTERS.index(character)] = 1.0
        return found

    logits.calls = calls  # type: ignore[attr-defined]
    return logits


def by_hand(one: Probe) -> str:
    """The answer, from the prompt alone."""
    lines = one.prompt.split("\n")
    if one.kind == "copy":
        return f" {lines[-2].removeprefix('line: ')}\n"
    if one.kind == "recall":
        return next(f" {line.split()[-1]}\n" for line in lines[:-1] if line.startswith(lines[-1]))
    if one.kind == "brackets":
        pairs = {"(": ")", "[": "]", "{": "}"}
        return " " + " ".join(pairs[part] for part in reversed(lines[-2].removeprefix("open: ").split())) + "\n"
    if one.kind == "add":
        return f" {sum(int(part) for part in lines[-1].removesuffix(' =').split(' + '))}\n"
    words = one.prompt.split()
    return " " + " ".join([*words[1:3], words[0]])


def test_each_answer_follows_from_its_prompt() -> None:
    found = probes(20, seed=3)
    assert [one.kind for one in found] == [kind for kind in KINDS for _ in range(20)]
    for one in found:
        assert one.answer == by_hand(one), one
    assert len({one.prompt for one in found}) > 90, "they differ"
    assert found == probes(20, seed=3) != probes(20, seed=4)
    assert found[:5] == probes(5, seed=3)[:5], "fewer are the first ones"
    with pytest.raises(OptionError, match="at least 1"):
        probes(0)


def test_one_wrong_character_is_wrong() -> None:
    asked, tokenizer = probes(4), ByCharacter()
    model = knowing(asked)
    assert probe(model, tokenizer, per_kind=4, batch=6).share == 1.0
    assert len(set(model.calls)) == 1, "one shape for all calls"
    found = probe(knowing(asked, lambda one: one.kind == "add"), tokenizer, per_kind=4)
    assert found.solved["add"] == (False,) * 4 and found.share == 0.8
    assert probe(lambda ids: torch.zeros(*ids.shape, len(CHARACTERS)), tokenizer, per_kind=4).share == 0.0


def test_the_run_says_what_greedy_decoding_would_write() -> None:
    """A random model, token by token, against its own probes."""
    torch.manual_seed(0)
    table = torch.randn(len(CHARACTERS), len(CHARACTERS))
    table[CHARACTERS.index("="), CHARACTERS.index(" ")] = 9.0
    table[CHARACTERS.index(" "), CHARACTERS.index("7")] = 9.0
    table[CHARACTERS.index("7"), CHARACTERS.index("\n")] = 9.0
    found = probe(lambda ids: table[ids], ByCharacter(), per_kind=30)
    for kind in KINDS:
        for solved, one in zip(found.solved[kind], [one for one in probes(30) if one.kind == kind], strict=True):
            text = one.prompt
            for _ in one.answer:
                text += CHARACTERS[int(table[CHARACTERS.index(text[-1])].argmax())]
            assert solved == (text == one.prompt + one.answer)
    assert 0 < sum(found.solved["add"]) < 30


def test_what_the_intact_model_cannot_do_does_not_count() -> None:
    intact = ProbeScores({"copy": (True, True, False), "add": (False, False, False)})
    other = ProbeScores({"copy": (True, False, True), "add": (True, True, True)})
    assert other.kept(intact) == {"copy": 0.5, "add": None, "all": 0.5}
    assert ProbeScores.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    with pytest.raises(ValueError, match="not asked the same"):
        ProbeScores({"copy": (True,)}).kept(intact)


def test_bad_input_is_said() -> None:
    with pytest.raises(OptionError, match="need a tokenizer"):
        probe(lambda ids: ids, None)
    with pytest.raises(OptionError, match="makes no tokens of"):
        probe(lambda ids: ids, lambda text, **_: {"input_ids": []})
    with pytest.raises(ValueError, match="NaN"):
        probe(lambda ids: torch.full((*ids.shape, 3), float("nan")), ByCharacter())
