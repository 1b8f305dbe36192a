"""What `fxfusion eval` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxfusion.cli.screen import Screen

Found = Mapping[str, Any]


def show(result: Found, screen: Screen) -> None:
    """Every part of the result that is there."""
    quality(result["quality"], screen)
    for name, part in (("generation", generation), ("speed", speed), ("tasks", tasks)):
        if name in result:
            part(result[name], screen)


def quality(found: Mapping[str, Found], screen: Screen) -> None:
    """Two tables, since the intervals take room: what it predicts, and how far that is from the reference."""
    losses = [
        (name, number(one["perplexity"], 2), number(one["loss"], 3), number(one["loss_increase"], 3, signed=True))
        for name, one in found.items()
    ]
    screen.table(("", "perplexity", "loss [nats]", "increase"), losses)
    screen.line("")
    distances = [
        (name, number(one["kl"], 4), number(one["top1"], 1, 100), number(one["top5"], 1, 100))
        for name, one in found.items()
    ]
    screen.table(("against the first row", "KL [nats]", "top 1 agrees [%]", "top 5 agrees [%]"), distances)
    control = next(iter(found.values()))
    exact = control["kl"]["value"] == 0 and control["top1"]["value"] == 1
    screen.line("In brackets: 95 % intervals. The first row is the model against itself, as control.", "dim")
    if not exact:
        screen.line("The control is not zero: differences of that size are rounding, and mean nothing.", "bold red")


def generation(found: Found, screen: Screen) -> None:
    count, length = found["prompts"], found["max_new_tokens"]
    text = f"{number(found['length'], 1)} of {length} tokens are the reference's, mean of {count} prompts;"
    screen.line(f"\nGreedy text: {text} {number(found['equal'], 0, 100)} % of the texts are equal")
    for sample in found["samples"][:1]:
        for name in ("prompt", "reference", "model"):
            written = sample.get(f"{name}_text")
            screen.line(f"{name + ':':<11}{sample[name] if written is None else repr(written)}", "dim")


def speed(found: Mapping[str, Found], screen: Screen) -> None:
    against = list(next(iter(found.values()))["fused_against"])
    rows = [
        (
            name,
            *(number(one["fused_against"][other], 3) for other in against),
            number(one["control"], 3),
            f"{one['seconds']['fused'] * 1e3:.2f}",
        )
        for name, one in found.items()
    ]
    screen.line("")
    screen.table(("times faster than", *against, "control", "fused [ms]"), rows)


def tasks(found: Mapping[str, Found], screen: Screen) -> None:
    rows = [
        (f"{task} {metric}", name, number(value, 4))
        for name, scores in found.items()
        for task, score in scores.items()
        for metric, value in score["metrics"].items()
    ]
    screen.line("")
    screen.table(("task", "model", "score"), sorted(rows))


def number(found: Mapping[str, float | None], places: int, factor: float = 1.0, signed: bool = False) -> str:
    """`1.23 [1.20, 1.26]`"""
    sign = "+" if signed else ""

    def one(part: str) -> str:
        value = found[part]
        return "?" if value is None else f"{value * factor:{sign}.{places}f}"

    return f"{one('value')} [{one('low')}, {one('high')}]"
