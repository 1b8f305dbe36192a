"""Memory beyond the model: of the backend, of recompiles, and of `fuse`.

    python -m bench.memory

Goals: the backend at most the weights of the fused groups, recompiles nothing, `fuse` at most one group.
Each route is a process of its own, with a model of 0.6 GB. What the compiler needs for itself is not counted: graphs
run uncompiled, after a small model that has loaded what loads.
"""

from __future__ import annotations

from bench.record import Measurement, arguments, record
from bench.scale import child
from bench.show import bytes_, table

PREDICTIONS = {
    "backend": "peak: the groups' weights, and one weight more while it is folded",
    "fuse": "peak: one group",
}

_SCRIPT = """
import gc, json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import fxfusion
from fxfusion import ffn_fusion
torch.set_num_threads(1)

def memory(which):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))

def build(hidden, width):
    config = LlamaConfig(vocab_size=128, hidden_size=hidden, intermediate_size=width, num_hidden_layers=9,
                         num_attention_heads=8, num_key_value_heads=2)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for value in model.parameters():
            value.uniform_(-1, 1).mul_(value.shape[-1] ** -0.5)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return fxfusion.drop_attention(model.eval(), DROPPED, check=False)

DROPPED, GROUPS = [1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]
PLAN = {"dropped_attention": DROPPED, "groups": GROUPS}
found = {}

def beyond(which, start):
    gc.collect()
    return memory(which) - start

def backend(model, start):
    compiled = torch.compile(model, backend=ffn_fusion, dynamic=False,
                             options={"plan": PLAN, "compiler": "eager", "strict": True})
    with torch.no_grad():
        compiled(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        found["peak"], found["after"] = beyond("VmHWM:", start), beyond("VmRSS:", start)
        for tokens in (5, 6):
            compiled(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        found["recompiled"] = beyond("VmRSS:", start)

def surgery(model, start):
    fxfusion.fuse(model, PLAN)
    found["peak"], found["after"] = beyond("VmHWM:", start), beyond("VmRSS:", start)

route = {"backend": backend, "fuse": surgery}[sys.argv[1]]
route(build(64, 96), 0)
torch._dynamo.reset()
gc.collect()
model = build(1024, 4096)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
size = sum(value.nbytes for value in model.parameters())
route(model, memory("VmRSS:"))
group = 3 * 3 * 1024 * 4096 * 4
print(json.dumps({"found": found, "model": size, "groups": group * (2 if sys.argv[1] == "backend" else 1)}))
"""


def measure_route(route: str) -> Measurement:
    """`group_bytes`: of all fused groups for the backend, of the widest one for `fuse`."""
    # What is freed goes back at once, so that the figures say what is held, not what malloc keeps for later.
    said = child(_SCRIPT, route, MALLOC_MMAP_THRESHOLD_=str(2**20), OMP_NUM_THREADS="1")
    samples = {name: [float(value)] for name, value in said["found"].items()}
    facts = {"model_bytes": said["model"], "group_bytes": said["groups"]}
    return Measurement.of({"route": route}, samples, unit="bytes", facts=facts)


def main() -> None:
    arguments(__doc__).parse_args()
    found = [measure_route(route) for route in ("backend", "fuse")]
    rows = [
        (one.place["route"], bytes_(float(one.facts["group_bytes"] or 0)), name, bytes_(value.value))
        for one in found
        for name, value in one.medians.items()
    ]
    print(table(rows, ("route", "fused groups", "when", "beyond the model")))
    print("recorded:", record("memory", measurements=found, predictions=PREDICTIONS).name)


if __name__ == "__main__":
    main()
