"""What training gives back on the reference model, from the raw and from the refitted start: what `refit` saves.

    python -m bench.recovery_training            (make results; about ten minutes on one core)

Half of the attention is dropped, its FFNs are one. Both starts learn from the same batches in the same order, by
`recover`: KL to the intact model, all weights, at two learning rates, as the better start wants the lower one.
Measured on held-out text. Each run is kept in .fxfusion_results, so what was stopped goes on. The section of
docs/results.md is bench/pages/recovery_training.md.j2.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from torch import Tensor

from bench import show
from bench.choosing import CACHE, numbers
from bench.record import record
from bench.recovery import TOKENS_PER_BATCH, Cells, Study, half_run, plan_of, say
from bench.reference import calibration_batches
from bench.show import Row
from fxfusion import evaluate, fuse, recover, refit
from fxfusion.recovery.distil import Step
from fxfusion.recovery.recover import RECORD

STARTS = ("raw", "refitted")
RATES, EVERY = (5e-4, 1e-4), 10
_BATCH, _SEQ = 4, 256  # of a step
_DECIDES = 4  # batches, the last of the calibration text that is used


def start(study: Study, name: str, batches: int) -> tuple[Any, float]:
    """The model that training starts from, and what it took to have it [seconds]."""
    dropped, groups = half_run(study)
    started = time.perf_counter()
    plan = plan_of(dropped, groups)
    if name == "raw":
        found = fuse(copy.deepcopy(study.model), plan)
    else:
        found = refit(study.model, plan, calibration_batches(limit=batches), "intact", sides="out")
    return found, time.perf_counter() - started


def trained(study: Study, name: str, rate: float, steps: int, batches: int, cache: Path) -> dict[str, Any]:
    """One start: quality before and after, the losses of every step, seconds."""
    model, seconds_start = start(study, name, batches)
    text = calibration_batches(_BATCH, _SEQ, steps + _DECIDES)
    chosen: dict[str, Any] = {"steps": steps, "every": EVERY, "learning_rate": rate, "cache": cache}

    def measure(model: Any) -> dict[str, Any]:
        return numbers(evaluate(model, study.heldout, study.model))

    found = train(model, study.model, text[:-_DECIDES], text[-_DECIDES:], measure, **chosen)
    return {"start": name, "learning_rate": rate, "seconds_start": seconds_start, **found}


def train(
    model: Any,
    reference: Any,
    text: Sequence[Tensor],
    decides: Sequence[Tensor],
    measure: Callable[[Any], dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """What `measure` says before and after `recover`, the losses of every step, seconds."""
    before = measure(model)
    start = evaluate(model, decides, reference, resamples=100).kl
    assert start is not None
    curve: list[dict[str, Any]] = []

    def tell(step: Step) -> None:
        curve.append({"step": step.step, "kl": step.loss, "validation": step.validation})

    started = time.perf_counter()
    recover(model, text, reference, validation=decides, **more, on_step=tell)
    seconds = time.perf_counter() - started
    changed = RECORD in model.config.fxfusion
    own = {"before": before, "after": measure(model), "changed": changed}
    return {**own, "validation_before": float(start), "seconds": seconds, "curve": curve}


TABLE: show.Columns = {
    "start": "start",
    "largest learning rate": lambda row: f"{row['learning_rate']:g}",
    "loss before": "before.loss_increase",
    "loss after": "after.loss_increase",
    "KL before": "before.kl",
    "KL after": "after.kl",
    "seconds to have it": lambda row: f"{row['seconds_start']:.0f}",
    "seconds of training": lambda row: f"{row['seconds']:.0f}",
}


def write_section(results: Mapping[str, Any], folder: Path = show.DOCS) -> Path:
    """Write the section and its plot."""
    plot_curves(results["rows"], folder / "figures" / "recovery_training.svg")
    return show.write_section(folder, "recovery training", globals() | {"results": results, **results})


def worth(raw: Row, refitted: Row) -> str:
    """What the refit is worth in steps."""
    goal, steps = refitted["validation_before"], len(raw["curve"])
    reached = [row["step"] for row in raw["curve"] if row["validation"] is not None and row["validation"] <= goal]
    found = f"{reached[0]} steps come" if reached else f"{steps} steps do not come"
    return f"From the raw start, {found} to where the refit begins"


def best_of(rows: Sequence[Row], start: str) -> Row:
    """The run from a start that came to the least KL on the text for validation."""
    return min((row for row in rows if row["start"] == start), key=lambda row: min(kl for _, kl in measured(row)))


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    figure, axes = show.new_figure(x="steps", y="KL on the text for validation [nats per token]")
    show.draw_lines(axes, {f"{row['start']} start, {row['learning_rate']:g}": measured(row) for row in rows})
    axes.set_ylim(bottom=0)
    axes.legend()
    show.save(figure, path)


def measured(row: Row) -> list[tuple[float, float]]:
    """The start and every measurement on the text for validation: (step, KL)."""
    later = [(float(one["step"]), float(one["validation"])) for one in row["curve"] if one["validation"] is not None]
    return [(0.0, float(row["validation_before"])), *later]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help=f"of {_BATCH} x {_SEQ} tokens")
    parser.add_argument("--calibration", type=int, default=24, help="batches of 8 x 256 tokens, of the refit")
    parser.add_argument("--heldout", type=int, default=8, help="batches of 8 x 256 tokens")
    options = parser.parse_args()
    study = Study(options.calibration, options.heldout)
    folder = CACHE / f"recovery_training_{options.steps}_{options.calibration}"
    cells = Cells(folder / "cells.json")
    rows = []
    for name, rate in product(STARTS, RATES):
        make = partial(trained, study, name, rate, options.steps, options.calibration, folder / f"{name}_{rate:g}")
        rows.append(cells.get(f"{name} start, rate {rate:g}", make))
    dropped, groups = half_run(study)
    step = _BATCH * _SEQ
    text = {"tokens_per_step": step, "validation": _DECIDES * step, "refit": options.calibration * TOKENS_PER_BATCH}
    results = {"dropped": dropped, "groups": groups, "text": text, "rows": rows}
    say(f"recorded: {record('recovery_training', results).name}; written: {write_section(results)}")


if __name__ == "__main__":
    main()
