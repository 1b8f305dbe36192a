"""How long `auto` takes here, and what room it needs: one block is timed, the passes over the text are counted.

    seconds = passes * (what stands before the blocks + blocks * one block + what stands after them)

An estimate: refits and windows that turn out hopeless take what they take. Imported when it is used.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, fx

from fxfusion.errors import FxFusionError
from fxfusion.models.traced import Run, TracedModel
from fxfusion.planning.make_plan import MAX_WINDOW
from fxfusion.planning.request import Request
from fxfusion.planning.scores import FITTED, JUDGED, SCREENED
from fxfusion.planning.windows import JUDGED_ON_THE_WAY, PROBES_AFTER_REFIT, TRIED

_WINDOW = 0.3  # passes over the screen's text for one window: most are ranked by a part of that
_LONGER = 0.5  # of the windows of three and more layers, this part is measured: the others are hopeless
# Passes over a text that it is fitted to: each block once in both models, sums and solutions, what decides.
_REFIT = 4.0
_RUNS = 4  # of one part, the least of which counts
_COPIES = 3  # of the weights: the model, the fused one, and the one that is written


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A part of the job: `tokens` that a whole model reads in it, and the `seconds` that this is likely to take."""

    what: str
    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes at the peak in memory, and on the disk in the end."""

    memory: int
    disk: int

    def check(self, output: Path) -> None:
        """Raises `FxFusionError` where the disk has no room for what would be written."""
        place = next(parent for parent in (output, *output.resolve().parents) if parent.exists())
        free = shutil.disk_usage(place).free
        if free < self.disk:
            raise FxFusionError(f"{place}: {self.disk / 1e9:.1f} GB are to be written, {free / 1e9:.1f} GB are free")


def seconds_per_token(traced: TracedModel, batch: Tensor) -> float:
    """Of one pass over text of the batch's shape `[rows, length]`: what stands before the blocks, the first block and
    what stands after the last one are timed; the first block's result stands for the last one's."""
    graph = traced.graph(batch)
    blocks = graph.blocks.layers
    first, last = blocks[0], blocks[-1]

    def timed(keep: fx.Node, base: Run | None) -> tuple[Run, float]:
        """The least of some runs: what else the process does, such as collecting garbage, makes single ones longer."""
        seconds = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            found = graph.run(batch, keep=[keep], base=base)
            seconds.append(time.perf_counter() - start)
        return found, min(seconds)

    before, start = timed(first.before, None)
    block, one = timed(first.after, before)
    shared = {node: block.values.get(node, before.values.get(node)) for node in before.shared}
    stands_in = Run({**shared, last.after: block[first.after]}, frozenset(), before.shared)
    _, end = timed(graph.logits, stands_in)
    return (start + len(blocks) * one + end) / batch.numel()


def steps_of(
    asked: Request, choosing: int, fitted: int, held_out: int, *, layers: int, mixers: int, each: float
) -> list[Step]:
    """What `auto` does, in order, with the tokens that a whole model reads in each part.

    `choosing`, `fitted`, `held_out`: tokens of the text; `layers`, `mixers`: numbers of them; `each`: seconds of one
    token in one pass.
    """
    screen, judge = min(choosing, SCREENED), min(choosing, JUDGED)
    roads = len(asked.roads or ())
    longest = min(asked.max_window or MAX_WINDOW, asked.limits.max_members or layers, layers)
    windows = mixers * ("drop" in (asked.roads or ()))
    windows += roads * max(0, layers - 1) * (longest > 1)
    windows += round(_LONGER * roads * sum(layers - size + 1 for size in range(3, longest + 1)))
    prices = 1 if asked.budget.most is not None else PROBES_AFTER_REFIT
    tried = prices * TRIED * (roads if prices == 1 and roads > 1 else 1)
    tokens = float(screen * (1 + _WINDOW * windows + tried))
    words = f"choose: {windows} windows of layers alone, some {tried} whole plans"
    if asked.after_refit:
        refits = roads + prices * JUDGED_ON_THE_WAY
        tokens += refits * (_REFIT * min(fitted, FITTED) + 2 * judge)
        words += f", some {refits} of them after a refit"
    parts = [
        (words, tokens),
        (f"refit the chosen plan on {fitted:,} tokens", _REFIT * fitted),
        (f"measure both models on {held_out:,} tokens that were held out", 3.0 * held_out),
        ("time both models", held_out / 4),
        ("write the folder, and prove it", held_out / 4),
    ]
    return [Step(what=what, tokens=count, seconds=count * each) for what, count in parts]


def room_of(model: Any, batch: Tensor, written: int) -> Room:
    """`batch`: `[rows, length]` of the text. `written`: bytes of the folder."""
    weights = sum(
        value.numel() * value.element_size() for value in {id(one): one for one in model.parameters()}.values()
    )
    logits = batch.numel() * int(model.config.get_text_config().vocab_size) * 4
    return Room(memory=_COPIES * weights + 6 * logits, disk=written + weights)


def told(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def lines_of(steps: Sequence[Step], room: Room) -> list[str]:
    """What is said before it starts."""
    found = [f"{number}. {step.what}: about {told(step.seconds)}" for number, step in enumerate(steps, 1)]
    whole = told(sum(step.seconds for step in steps))
    found.append(f"in all about {whole}, an estimate from one block timed on this machine;")
    found.append(f"at most some {room.memory / 1e9:.1f} GB of memory and {room.disk / 1e9:.1f} GB of disk")
    return found
