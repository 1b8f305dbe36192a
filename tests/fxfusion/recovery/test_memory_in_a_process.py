"""Peak memory of a refit at real widths, in a process of its own: what the formula says, and no more than the limit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fxfusion.recovery.gram import bytes_needed

HIDDEN, MIB = 64, 2**20

# The threads' own buffers and the allocator's leftovers: the peak with one narrow layer is taken off.
CHILD = """
import json, resource, sys, threading, time
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fxfusion.recovery.refit import refit
from tests.end_to_end.families import randomise

width, limit = int(sys.argv[1]), int(sys.argv[2])
config = LlamaConfig(hidden_size=64, intermediate_size=width // 2, num_hidden_layers=3, num_attention_heads=4,
                     vocab_size=97, max_position_embeddings=64)
model = LlamaForCausalLM(config).eval()
randomise(model, 0)
with torch.no_grad():
    model.lm_head.weight.mul_(8.0)
torch.manual_seed(0)
text = model.generate(torch.randint(3, 97, (48, 1)), max_new_tokens=23, min_new_tokens=23, do_sample=True, top_k=0)
plan = {"dropped_attention": [1, 2], "groups": [[1, 2]]}
peak, done = [0], False
def watch():
    while not done:
        with open("/proc/self/statm") as file:
            peak[0] = max(peak[0], int(file.read().split()[1]) * resource.getpagesize())
        time.sleep(0.005)
refit(model, {"dropped_attention": [1, 2], "groups": [[1, 2]]}, list(text.split(8)), "intact", later="none",
      penalties=(0.01,), memory_limit=1 << 20)  # everything is loaded and captured once
with open("/proc/self/statm") as file:
    start = int(file.read().split()[1]) * resource.getpagesize()
threading.Thread(target=watch, daemon=True).start()
parts = []
refit(model, plan, list(text.split(8)), "intact", later="none", penalties=(0.01,), memory_limit=limit,
      on_layer=lambda layer, fit: parts.append(fit.parts))
done = True
print(json.dumps({"used": peak[0] - start, "parts": parts[-1]}))
"""


def run(width: int, limit: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHILD, str(width), str(limit)],
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("width", [2048, 8192])
def test_resident_memory_keeps_to_the_formula_and_to_the_limit(width: int) -> None:
    needed = bytes_needed(width, HIDDEN, 1)
    weights = 20 * width * HIDDEN * 4  # of the fused copy, and of what is kept to go back to
    whole, limited = run(width, needed * 4 // 3 + 1), run(width, needed // 3)
    assert whole["parts"] == 1 and limited["parts"] > 1
    assert needed / 2 < whole["used"] < needed + weights + 64 * MIB
    assert limited["used"] < needed // 4 + weights + 64 * MIB
