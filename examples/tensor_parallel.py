"""A fused model on several devices: each holds a slice of every member, and a fused FFN needs one all-reduce.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py MODEL --plan plan.yaml

    unfused   x -> FFN of layer 4 -> all-reduce -> FFN of layer 5 -> all-reduce -> FFN of layer 6 -> all-reduce
    fused     x -> wide FFN       -> all-reduce

MODEL is a folder that transformers loads, the plan names attention to drop and FFNs to fuse (`fxfusion plan` makes
one). `--by transformers` uses the model's own tensor-parallel plan, `--by torch` plain `parallelize_module`. Runs on
CUDA devices where there are enough, else on the CPU. The first process prints what was measured, as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from fnmatch import fnmatch
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import TensorParallelLayer

import fxfusion


class SharedInput(TensorParallelLayer):
    """For a module whose gate and up projections read one input: its gradient is summed over devices once, where two
    column-wise layers by themselves would do it twice."""

    def transform_inputs_pre_forward(self, module: nn.Module, args: Any, kwargs: Any, mesh: DeviceMesh) -> Any:
        x, *others = args
        if torch.is_grad_enabled() and not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        return (x, *others), kwargs


def by_transformers(model: Any, styles: dict[str, str]) -> Any:
    """Cut by the model's own plan. `styles`: rules beside it or in the place of some."""
    ALL_PARALLEL_STYLES.register("shared_input", SharedInput())
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=styles)
    config, _, mesh = type(model).prepare_distribute_model(config)
    return type(model).maybe_distribute_model(model, config, mesh)


def by_torch(model: nn.Module, styles: dict[str, str]) -> nn.Module:
    """Cut by `torch.distributed.tensor.parallel` alone. `styles`: colwise, rowwise or shared_input by name pattern."""
    makers = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel, "shared_input": _shared_input}
    plan: dict[str, ParallelStyle] = {name: makers[style]() for name, style in styles.items()}
    mesh = init_device_mesh(device().type, (dist.get_world_size(),))
    return parallelize_module(model, mesh, plan)


def _shared_input() -> ParallelStyle:
    return PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))


def styles_of(model: Any, by: str, ffn: str) -> dict[str, str]:
    """The rules that the model's config has for its layers, and one for the FFN's input. `ffn`: its name in a layer."""
    base = model.base_model_prefix
    own = {f"{base}.{name}": style for name, style in model.config.base_model_tp_plan.items()} if by == "torch" else {}
    return {**{name: style for name, style in own.items() if style in ("colwise", "rowwise")}, ffn: "shared_input"}


def device() -> torch.device:
    """This process's own."""
    local = int(os.environ["LOCAL_RANK"])
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    return torch.device("cuda", local) if enough else torch.device("cpu")


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def measure(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Logits `[batch, tokens, vocabulary]`, gradients of all parameters, and the all-reduces of both passes."""
    with CommDebugMode() as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    with CommDebugMode() as backward:
        loss_of(logits, ids).backward()
    whole = {name: _whole(value.grad) for name, value in model.named_parameters() if value.grad is not None}
    return {"logits": logits.detach(), "gradients": whole, "all_reduces": _all_reduces(forward, backward)}


def measure_ffns(model: nn.Module, pattern: str, hidden: int) -> list[dict[str, int]]:
    """The all-reduces of each FFN by itself."""
    found = []
    for name, ffn in model.named_modules():
        if fnmatch(name, pattern):
            x = torch.ones(1, 1, hidden, device=device(), requires_grad=True)
            with CommDebugMode() as forward:
                y = ffn(x)
            with CommDebugMode() as backward:
                y.sum().backward()
            found.append(_all_reduces(forward, backward))
    return found


def _all_reduces(forward: CommDebugMode, backward: CommDebugMode) -> dict[str, int]:
    def count(seen: CommDebugMode) -> int:
        return sum(times for name, times in seen.get_comm_counts().items() if "allreduce" in str(name).replace("_", ""))

    return {"forward": count(forward), "backward": count(backward)}


def _whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, as a part of the largest wanted value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def slices(model: nn.Module) -> dict[str, Tensor]:
    """What this process holds of each parameter that is cut."""
    cut = {name: value for name, value in model.named_parameters() if isinstance(value, DTensor)}
    return {name: value.to_local().detach().contiguous().cpu() for name, value in cut.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--plan", required=True, help="plan file of fxfusion")
    parser.add_argument("--by", choices=("transformers", "torch"), default="transformers")
    parser.add_argument("--ffn", default="model.layers.*.mlp", help="name pattern of the FFN modules")
    parser.add_argument("--styles", type=json.loads, default={}, help="JSON: further rules of the tensor-parallel plan")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--save-slices", metavar="FOLDER", help="write what each process holds, as safetensors")
    options = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo")
    try:
        found = run(options)
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        print(json.dumps(found))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The fused and the unfused model, each on all devices, against the fused model on one."""
    rank, devices = dist.get_rank(), dist.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True).to(device())
    plan = fxfusion.FusionPlan.load(options.plan)
    fxfusion.drop_attention(model, plan.dropped_attention)
    unfused = copy.deepcopy(model)
    fxfusion.fuse(model, plan, shards=devices)

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (2, options.tokens), generator=generator).to(device())
    alone = measure(copy.deepcopy(model), ids)

    cut = by_transformers if options.by == "transformers" else by_torch
    found: dict[str, Any] = {"by": options.by, "devices": devices}
    for name, one in (("unfused", unfused), ("fused", model)):
        one = cut(one, {**styles_of(one, options.by, options.ffn), **options.styles})
        seen = measure(one, ids)
        found[name] = {
            "logits_off": off(seen["logits"], alone["logits"]),  # from the fused model's, on one device
            "all_reduces": seen["all_reduces"],
            "all_reduces_of_each_ffn": measure_ffns(one, options.ffn, one.config.hidden_size),
        }
    found["gradients_off"] = max(off(seen["gradients"][name], wanted) for name, wanted in alone["gradients"].items())
    if options.save_slices:
        save_file(slices(model), os.path.join(options.save_slices, f"rank-{rank}.safetensors"))
    return found


if __name__ == "__main__":
    main()
