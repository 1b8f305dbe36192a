"""An exported fused model on several devices, by transformers alone: fxfusion is not needed to load it.

    torchrun --nproc-per-node 2 examples/load_on_many_devices.py FOLDER

FOLDER is what `fxfusion.save_pretrained(model, FOLDER, format="nemotron-nas")` wrote. Its own modeling file is run
(`trust_remote_code`), so look at it first where it is not yours. Each process reads only its part of the weights. The
first process prints what was measured, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        found = run(options)
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(found))


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    """Logits and greedy text of the model in parts, against the model in one piece."""
    if dist.get_rank() == 0:  # copies the modeling file to where Python finds it, once
        AutoConfig.from_pretrained(options.folder, trust_remote_code=True, local_files_only=True)
    dist.barrier()
    alone = load(options.folder)
    parts = load(options.folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size()))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(alone.config.vocab_size, (2, options.tokens), generator=generator).to(parts.device)
    wanted = alone.to(parts.device)(input_ids=ids, use_cache=False).logits
    with CommDebugMode() as seen:
        logits = parts(input_ids=ids, use_cache=False).logits
    greedy = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    held = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in parts.parameters())
    return {
        "logits_off": float((logits - wanted).abs().max() / wanted.abs().max()),
        "same_text": bool(torch.equal(parts.generate(ids, **greedy), alone.generate(ids, **greedy))),
        "all_reduces": _all_reduces(seen),
        "parameters": sum(value.numel() for value in alone.parameters()),
        "parameters_held": held,
    }


def _all_reduces(seen: CommDebugMode) -> int:
    return sum(times for name, times in seen.get_comm_counts().items() if "allreduce" in str(name).replace("_", ""))


def load(folder: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **options)


if __name__ == "__main__":
    main()
