"""How long a user waits from a trained model to the page of results, on the reference model, offline.

    python -m bench.whole_path
    python -m bench.whole_path --assisted       the fused model as the draft of the intact one: assisted.json

Each command runs in a process of its own, as from a shell: score -> plan -> explain -> eval (drops the attention,
compiles with the plan, evaluates and writes text) -> report. Goal: under 5 minutes on 2 cores.
Choices are made on calibration text, quality is measured on held-out text.

As a draft: how many of its tokens are accepted, and is it faster? Greedy assisted decoding of `transformers` on
held-out prompts: the draft proposes a fixed number of tokens, the target checks them in one call and keeps those that
it would have written itself. The text must be the target's own, token for token; where it is not, nothing is recorded.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxfusion
from bench.record import arguments, record
from bench.reference import CALIBRATION_FILE, HELD_OUT_FILE, MODEL_FOLDER, heldout_batches, load_model
from bench.show import table

GOAL_SECONDS = 300
DROP = 5  # attentions, of 12
_TIMES = ("seconds", "processor_seconds")
# The draft's plan, as `fxfusion plan --drop 5` found it (bench/results/whole_path.json).
PLAN = fxfusion.FusionPlan(dropped_attention=[1, 4, 6, 10, 11], groups=[[3, 4], [5, 6], [9, 10, 11]])
PROPOSED, NEW, PROMPT, PROMPTS = 3, 64, 64, 16  # tokens proposed at a time, written, of a prompt; prompts


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--assisted", action="store_true", help="measure assisted decoding instead")
    if parser.parse_args().assisted:
        measure_assisted()
        return
    with tempfile.TemporaryDirectory() as folder:
        found = whole_path(Path(folder))
    rows = [(name, *(f"{step[what]:.1f}" for what in _TIMES)) for name, step in found["steps"].items()]
    total = ("total", *(f"{found[f'total_{what}']:.1f}" for what in _TIMES))
    print(table([*rows, total], ("command", "seconds", "processor seconds")))
    path = record("whole_path", found, predictions={"total_seconds": f"at most {GOAL_SECONDS} on 2 cores"})
    print(f"written: {path.name}")


def whole_path(results: Path, *more: str) -> dict[str, Any]:
    """Seconds of each command and of all, with what they found. `more`: options of every measuring command."""
    calibration, heldout = (str(MODEL_FOLDER / name) for name in (CALIBRATION_FILE, HELD_OUT_FILE))
    kept, plan, model = ["--results", str(results)], str(results / "plan.yaml"), str(MODEL_FOLDER)
    commands = {
        "score": ["score", model, "--text", calibration, *kept, *more],
        "plan": ["plan", model, "--text", calibration, "--drop", str(DROP), *kept, *more],
        "explain": ["explain", model, "--plan", plan],
        "eval": ["eval", model, "--text", heldout, "--plan", plan, "--generate", "8", *kept, *more],
        "report": ["report", *kept],
    }
    steps = {name: _run(name, arguments) for name, arguments in commands.items()}
    return {
        "steps": {name: {what: step[what] for what in _TIMES} for name, step in steps.items()},
        **{f"total_{what}": sum(step[what] for step in steps.values()) for what in _TIMES},
        "plan": {name: steps["plan"]["found"]["plan"][name] for name in ("dropped_attention", "groups", "norm")},
        "quality": steps["eval"]["found"]["quality"],
        "page_bytes": Path(steps["report"]["found"]["page"]).stat().st_size,
    }


def _run(name: str, arguments: list[str]) -> dict[str, Any]:
    """One command with --json: what it printed, wall time, and processor time of all its threads."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "fxfusion", *arguments, "--json"]
    started, used = time.perf_counter(), _processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=MODEL_FOLDER.parents[2])
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"fxfusion {name} failed with {done.returncode}: {done.stderr[-2000:]}")
    print(f"{name}: {seconds:.1f} s", file=sys.stderr)
    return {"seconds": seconds, "processor_seconds": _processor_seconds() - used, "found": json.loads(done.stdout)}


def _processor_seconds() -> float:
    """Of all processes that were started from here and have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


# --- as a draft ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Assisted:
    """`text`: token ids `[1, prompt + written]`. `proposed`, `accepted`: how many tokens of the draft; `calls`: how
    often the target ran."""

    text: Tensor
    proposed: int
    accepted: int
    calls: int


def greedy(model: Any, prompt: Tensor, new: int = NEW, **options: Any) -> Tensor:
    """Token ids `[batch, prompt + new]`; a text is not ended early."""
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "pad_token_id": 0}
    found: Tensor = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **options)
    return found


def assisted(target: Any, draft: Any, prompt: Tensor, new: int = NEW, proposed: int = PROPOSED) -> Assisted:
    """Write as the target would, with a draft. `prompt`: `[1, tokens]`."""
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = proposed, "constant"
    settings.assistant_confidence_threshold = 0.0  # it proposes as many as it may, sure or not
    given: list[int] = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        text = greedy(target, prompt, new, assistant_model=draft)
    finally:
        hook.remove()
    # A call reads the last token and those proposed after it; the first one the whole prompt.
    candidates = [given[0] - prompt.shape[1], *(length - 1 for length in given[1:])]
    written = text.shape[1] - prompt.shape[1]
    return Assisted(text, sum(candidates), written - len(given), len(given))


def measure(target: Any, draft: Any, prompts: Sequence[Tensor], new: int = NEW) -> dict[str, Any]:
    """Acceptance and seconds over all prompts. Raises `RuntimeError` where the text is not the target's own."""
    runs, seconds = [], {"target alone": 0.0, "draft alone": 0.0, "assisted": 0.0}
    for prompt in prompts:
        times = [time.perf_counter()]
        alone = greedy(target, prompt, new)
        times.append(time.perf_counter())
        greedy(draft, prompt, new)
        times.append(time.perf_counter())
        runs.append(assisted(target, draft, prompt, new))
        times.append(time.perf_counter())
        for name, start, end in zip(seconds, times[:-1], times[1:], strict=True):
            seconds[name] += end - start
        if not torch.equal(runs[-1].text, alone):
            raise RuntimeError("assisted decoding wrote another text than the target alone")
    written = new * len(prompts)
    rates = [run.accepted / run.proposed for run in runs]
    return {
        "prompts": len(prompts),
        "tokens_written": written,
        "tokens_proposed": sum(run.proposed for run in runs),
        "tokens_accepted": sum(run.accepted for run in runs),
        "acceptance_rate": sum(run.accepted for run in runs) / sum(run.proposed for run in runs),
        "acceptance_rate_of_prompts": {"lowest": min(rates), "median": statistics.median(rates), "highest": max(rates)},
        "tokens_per_target_call": written / sum(run.calls for run in runs),
        "same_text": True,
        "tokens_per_second": {name: written / value for name, value in seconds.items()},
    }


def measure_assisted() -> None:
    target, draft = load_model(), fxfusion.fuse(load_model(), PLAN)
    (batch,) = heldout_batches(batch=PROMPTS, seq=PROMPT, limit=1)
    measure(target, draft, batch[:1].split(1), new=8)  # warm-up
    found = measure(target, draft, batch.split(1))
    facts = {
        "plan": {name: PLAN.to_dict()[name] for name in ("dropped_attention", "groups", "norm")},
        "layers": {"target": target.config.num_hidden_layers, "draft": draft.config.num_hidden_layers},
        "proposed_at_a_time": PROPOSED,
    }
    rows = [(name, f"{value:.3f}") for name, value in found.items() if isinstance(value, float)]
    rows += [(f"tokens/s, {name}", f"{value:.1f}") for name, value in found["tokens_per_second"].items()]
    print(table(rows, ("", "value")))
    predictions = {"acceptance_rate": "0.5 to 0.8 (top-1 agreement of the fused model on held-out text is 0.71)"}
    print(f"written: {record('assisted', {**facts, **found}, predictions=predictions).name}")


if __name__ == "__main__":
    main()
