"""Generative probes: small tasks with one right answer, written by a rule, so that no data set is needed.

| kind | prompt ends with | answer |
|---|---|---|
| copy | `line: stone river glass` / `copy:` | ` stone river glass` |
| recall | `river is 42` ... `glass is 17` / `river is` | ` 42` |
| brackets | `open: ( [ {` / `close:` | ` } ] )` |
| add | `3 + 4 =` | ` 7` |
| repeat | `stone river glass stone river glass stone` | ` river glass stone` |

Pruned models lose these before they lose perplexity (arXiv 2602.01997, 2604.24938). An answer counts where the model,
decoding greedily, would write just its tokens and the end of the line: that is so exactly where each of them is the
most likely one after those before it, which one run over prompt and answer tells.

What the intact model cannot do says nothing of another one: `ProbeScores.kept` counts what the intact model solves.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxfusion.analysis.batches import Model, logits_of, measuring, model_device, run_model
from fxfusion.errors import OptionError
from fxfusion.report.progress import each

KINDS = ("copy", "recall", "brackets", "add", "repeat")
_WORDS = (
    *("stone", "river", "glass", "green", "house", "table", "paper", "water", "light", "music", "bread", "horse"),
    *("chair", "cloud", "field", "train"),
)
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_SHOTS = 3  # worked examples before the question


@dataclass(frozen=True, slots=True)
class Probe:
    """`answer`: what follows the prompt, its first space and the end of its line (if it has one) included."""

    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class ProbeScores:
    """For each kind, which of its probes were solved, in order."""

    solved: Mapping[str, tuple[bool, ...]]

    @property
    def share(self) -> float:
        """Of all probes, the part that was solved."""
        found = [one for kind in self.solved.values() for one in kind]
        return sum(found) / len(found)

    def kept(self, intact: ProbeScores) -> dict[str, float | None]:
        """For each kind, and for "all", the part solved of those that the intact model solves; None where it solves
        none of them. Raises ValueError for scores of other probes."""
        if {kind: len(own) for kind, own in self.solved.items()} != {
            kind: len(own) for kind, own in intact.solved.items()
        }:
            raise ValueError("the two were not asked the same probes")
        pairs = {kind: list(zip(own, intact.solved[kind], strict=True)) for kind, own in self.solved.items()}
        pairs["all"] = [pair for found in pairs.values() for pair in found]
        able = {kind: [mine for mine, other in found if other] for kind, found in pairs.items()}
        return {kind: sum(mine) / len(mine) if mine else None for kind, mine in able.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"solved": {kind: list(found) for kind, found in self.solved.items()}, "share": self.share}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProbeScores:
        """What `to_dict` gave."""
        return cls({kind: tuple(map(bool, found)) for kind, found in data["solved"].items()})


def probes(per_kind: int = 16, seed: int = 0) -> list[Probe]:
    """So many of each kind, the same ones for the same seed. Raises `OptionError` for none."""
    if per_kind < 1:
        raise OptionError(f"probes: expected at least 1 of each kind, got {per_kind}")
    makers = {"copy": _copy, "recall": _recall, "brackets": _brackets, "add": _add, "repeat": _repeat}
    found = []
    for kind in KINDS:
        draw = random.Random(f"{kind} {seed}")  # noqa: S311 (nothing is kept secret)
        found += [Probe(kind, *makers[kind](draw)) for _ in range(per_kind)]
    return found


def probe(
    model: Model, tokenizer: Any, *, per_kind: int = 16, seed: int = 0, batch: int = 8, progress: bool = False
) -> ProbeScores:
    """Ask a causal language model all probes.

    Args:
        model: a module or function from ids `[batch, seq]` to logits; all calls have one shape.
        tokenizer: of `transformers`, or alike: `tokenizer(text)["input_ids"]`.
        per_kind, seed: see `probes`. batch: how many run together.
        progress: say how far it is, on the error stream.

    Raises:
        OptionError: no tokenizer, or one that gives no tokens. ValueError: logits that are NaN.
    """
    if tokenizer is None:
        raise OptionError("probes: they are texts, so they need a tokenizer")
    asked = probes(per_kind, seed)
    rows = [_tokens(tokenizer, one) for one in asked]
    length = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(-(-len(rows) // batch) * batch, length, dtype=torch.int64)  # later tokens are not read
    for row, (own, _) in zip(ids, rows, strict=False):
        row[: len(own)] = torch.tensor(own)
    device, right = model_device(model), []
    with measuring(model):
        for part in each(ids.split(batch), progress, "probes"):
            logits = logits_of(run_model(model, {"input_ids": part}, device), part.shape, 0, "the model")
            if logits.isnan().any():
                raise ValueError("the logits are NaN: there is no most likely token")
            right.append(logits.argmax(dim=-1).cpu()[:, :-1] == part[:, 1:])
    hits = torch.cat(right)
    done = [bool(row[start - 1 : len(own) - 1].all()) for row, (own, start) in zip(hits, rows, strict=False)]
    return ProbeScores(
        {kind: tuple(ok for ok, one in zip(done, asked, strict=True) if one.kind == kind) for kind in KINDS}
    )


def _tokens(tokenizer: Any, one: Probe) -> tuple[list[int], int]:
    """Ids of prompt and answer, and where the answer begins: as a whole where the prompt's own tokens stay, else each
    alone."""
    prompt = _ids(tokenizer, one.prompt)
    whole = _ids(tokenizer, one.prompt + one.answer)
    if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        whole = [*prompt, *_ids(tokenizer, one.answer, add_special_tokens=False)]
    if not prompt or len(whole) == len(prompt):
        raise OptionError(f"probes: the tokenizer makes no tokens of {(one.prompt if not prompt else one.answer)!r}")
    return whole, len(prompt)


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    found = tokenizer(text, **options)["input_ids"]
    return found.flatten().tolist() if isinstance(found, Tensor) else [int(token) for token in found]


# --- the rules ----------------------------------------------------------------------------------------


def _with_shots(examples: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Worked examples, then the question; and its answer, with the end of the line."""
    *shown, (question, answer) = examples
    return "".join(f"{ask}{reply}\n" for ask, reply in shown) + question, f"{answer}\n"


def _copy(draw: random.Random) -> tuple[str, str]:
    lines = [" ".join(draw.sample(_WORDS, 3)) for _ in range(_SHOTS + 1)]
    return _with_shots([(f"line: {line}\ncopy:", f" {line}") for line in lines])


def _recall(draw: random.Random) -> tuple[str, str]:
    keys, values = draw.sample(_WORDS, 4), draw.sample(range(10, 100), 4)
    asked = draw.randrange(3)  # not the last one
    listed = "".join(f"{key} is {value}\n" for key, value in zip(keys, values, strict=True))
    return f"{listed}{keys[asked]} is", f" {values[asked]}\n"


def _brackets(draw: random.Random) -> tuple[str, str]:
    examples = []
    for _ in range(_SHOTS + 1):
        opened = [draw.choice(list(_PAIRS)) for _ in range(draw.randint(2, 3))]
        closed = [_PAIRS[one] for one in reversed(opened)]
        examples.append((f"open: {' '.join(opened)}\nclose:", f" {' '.join(closed)}"))
    return _with_shots(examples)


def _add(draw: random.Random) -> tuple[str, str]:
    pairs = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(_SHOTS + 1)]
    return _with_shots([(f"{one} + {other} =", f" {one + other}") for one, other in pairs])


def _repeat(draw: random.Random) -> tuple[str, str]:
    words = draw.sample(_WORDS, 3)
    return " ".join([*words * 3, words[0]]), " " + " ".join([*words[1:], words[0]])
