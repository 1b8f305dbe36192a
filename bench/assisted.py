"""The fused reference model as the draft of the intact one: how many of its tokens are accepted, and is it faster?

    python -m bench.assisted

Greedy assisted decoding of `transformers` on held-out prompts: the draft proposes a fixed number of tokens, the target
checks them in one call and keeps those that it would have written itself. The text must be the target's own, token
for token; where it is not, nothing is recorded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fxfusion
from bench.record import record
from bench.reference.load import heldout_batches, load_model
from bench.tables import table

# Of `fxfusion plan --drop 5` on calibration text (bench/results/whole_path.json).
PLAN = fxfusion.FusionPlan(dropped_attention=[1, 4, 6, 10, 11], groups=[[3, 4], [5, 6], [9, 10, 11]])
PROPOSED, NEW, PROMPT, PROMPTS = 3, 64, 64, 16  # tokens proposed at a time, written, of a prompt; prompts


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


def main() -> None:
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
