"""Packed weights follow every kind of write: counted by torch or not, from this process or another."""

from __future__ import annotations

import copy
import ctypes
import gc
import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fxfusion
from fxfusion.compiler import packing, weight_look
from fxfusion.compiler.packing import live_packs
from fxfusion.errors import GradientError
from tests.fxfusion.compiler.test_packing import compiled, other_state
from tests.helpers import Stack, assert_exact, error_of, parallel_form, stack, tokens

LAYER = 1


pytestmark = pytest.mark.usefixtures("clean_dynamo")


def model_of(dtype: torch.dtype = torch.float32) -> Stack:
    return stack(widths=(24, 40, 16), dtype=dtype)


def gate(model: nn.Module) -> nn.Parameter:
    found: nn.Parameter = model.layers[LAYER].ffn.gate.weight
    return found


def assert_followed(run: Callable[..., Any], model: nn.Module, x: Tensor, before: Tensor) -> None:
    with torch.no_grad():
        wanted = parallel_form(model, x)
        assert error_of(wanted, before) > 1e-4, "the write must be large enough to be seen"
        assert_exact(run(x), wanted, x.dtype)


# --- optimizers -----------------------------------------------------------------------------------------


class Uncounted(torch.optim.Optimizer):
    """Its kernel writes one element behind torch's back; no probe sees so little."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.detach().numpy().reshape(-1)[weight.numel() // 3] += 3.0


def _flat(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer holds one flat tensor, which the weights are views of."""
    weights = list(model.parameters())
    flat = torch.cat([weight.detach().reshape(-1) for weight in weights])
    pieces = flat.split([weight.numel() for weight in weights])
    for weight, piece in zip(weights, pieces, strict=True):
        weight.data = piece.view_as(weight)
    flat.grad = torch.ones_like(flat)
    return torch.optim.SGD([flat], lr=0.1, foreach=False)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "fused AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True),
    "fused SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, fused=True),
    "foreach SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, foreach=True),
    "one loop": lambda model: torch.optim.Adam(model.parameters(), lr=0.05, foreach=False),
    "a kernel of its own": lambda model: Uncounted([gate(model)]),
    "one flat tensor": _flat,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_steps_are_seen(name: str) -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    optimizer = OPTIMIZERS[name](model)
    run = compiled(model)
    for _ in range(2):
        with torch.no_grad():
            before = run(x)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert_followed(run, model, x, before)


@pytest.mark.compile
def test_a_compiled_step_is_seen() -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    step, run = torch.compile(optimizer.step), compiled(model)
    with torch.no_grad():
        before = run(x)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    step()
    assert_followed(run, model, x, before)


def test_training_and_inference_by_turns() -> None:
    """What the trainer of a model does: steps of a fused optimizer, and evaluation in between."""
    model, x = model_of(), tokens(dtype=torch.float32)
    twin = copy.deepcopy(model)
    run = compiled(model, "aot_eager")
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.05, fused=True) for m in (model, twin)]
    for _ in range(3):
        run(x).square().mean().backward()
        parallel_form(twin, x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            assert_exact(run(x), parallel_form(model, x), torch.float32)
            torch.testing.assert_close(run(x), parallel_form(twin, x), rtol=1e-3, atol=1e-4)


# --- adapters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "loha", "lokr", "oft", "boft", "vera", "fourierft"])
def test_merged_and_unmerged_adapters(kind: str) -> None:
    peft = pytest.importorskip("peft")
    names: dict[str, Any] = {"target_modules": ["gate", "up", "down"]}
    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, **names),
        "dora": lambda: peft.LoraConfig(r=2, init_lora_weights=False, use_dora=True, **names),
        "ia3": lambda: peft.IA3Config(feedforward_modules=["down"], init_ia3_weights=False, **names),
        "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, **names),
        "lokr": lambda: peft.LoKrConfig(r=2, init_weights=False, **names),
        "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, init_weights=False, **names),
        "boft": lambda: peft.BOFTConfig(boft_block_size=4, init_weights=False, **names),
        "vera": lambda: peft.VeraConfig(r=2, init_weights=False, d_initial=0.5, **names),
        "fourierft": lambda: peft.FourierFTConfig(n_frequency=16, init_weights=False, **names),
    }
    model, x = model_of(), tokens(dtype=torch.float32)
    adapted = peft.get_peft_model(model, configs[kind]()).eval()
    run = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            adapted.merge_adapter()
            merged = parallel_form(model, x)
            assert_exact(run(x), merged, torch.float32)
            adapted.unmerge_adapter()
            with adapted.disable_adapter():
                plain = parallel_form(model, x)
                assert error_of(merged, plain) > 1e-4
                assert_exact(run(x), plain, torch.float32)


# --- dense writes that torch does not count ---------------------------------------------------------------


def _data(weight: Tensor) -> None:
    weight.data.mul_(3)


def _half_of_the_rows(weight: Tensor) -> None:
    weight.data[: len(weight) // 2].mul_(3)


def _half_of_the_columns(weight: Tensor) -> None:
    weight.data[:, weight.shape[1] // 2 :].mul_(3)


def _numpy(weight: Tensor) -> None:
    weight.detach().numpy()[:] *= 3


def _dlpack(weight: Tensor) -> None:
    torch.from_dlpack(weight.detach()).mul_(3)


def _storage(weight: Tensor) -> None:
    weight.untyped_storage().copy_((weight.detach() * 3).untyped_storage())


def _buffer(weight: Tensor) -> None:
    memory = (ctypes.c_char * weight.nbytes).from_address(weight.data_ptr())
    torch.frombuffer(memory, dtype=weight.dtype).mul_(3)


def _set_to_nan_and_back(weight: Tensor) -> None:
    weight.data.fill_(float("nan"))
    weight.data.fill_(0.5)


WRITES = [_data, _half_of_the_rows, _half_of_the_columns, _numpy, _dlpack, _storage, _buffer, _set_to_nan_and_back]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("form", ["concatenated", "prepacked"])
def test_dense_writes_are_seen(write: Callable[[Tensor], None], form: str) -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model, form=form)
    with torch.no_grad():
        before, version = run(x), gate(model)._version
    write(gate(model))
    assert gate(model)._version == version, "torch counts this write now"
    assert_followed(run, model, x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dense_writes_are_seen_in_every_dtype(dtype: torch.dtype) -> None:
    """Doubling changes the exponent alone, which is in the upper half of eight bytes."""
    model = model_of(dtype)
    for weight in model.parameters():
        look = weight_look.Look([weight])
        weight.data.mul_(2)
        assert not look.is_of([weight])
        assert weight_look.Look([weight]).is_of([weight])


def test_inference_tensors() -> None:
    with torch.inference_mode():
        model, x = model_of(), tokens(dtype=torch.float32)
        run = compiled(model)
        before = run(x)
        gate(model).mul_(3)
        wanted = parallel_form(model, x)
        assert error_of(wanted, before) > 1e-4
        assert_exact(run(x), wanted, torch.float32)


def _double(weight: Tensor) -> None:
    weight.mul_(3)


def test_another_process_writes_shared_memory() -> None:
    model, x = model_of().share_memory(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
    child = torch.multiprocessing.get_context("spawn").Process(target=_double, args=(gate(model).detach(),))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert_followed(run, model, x, before)


def test_a_broadcast_is_seen(tmp_path: Any) -> None:
    """NCCL, gloo and the like write into the memory that they are given."""
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 2)
    values = (gate(model).detach() * 3).clone()
    errors: list[BaseException] = []

    def take_part(rank: int, tensor: Tensor) -> None:
        try:
            group = torch.distributed.ProcessGroupGloo(store, rank, 2)
            group.broadcast([tensor], torch._C._distributed_c10d.BroadcastOptions()).wait()
        except BaseException as error:
            errors.append(error)

    members = [threading.Thread(target=take_part, args=pair) for pair in ((0, values), (1, gate(model).data))]
    for member in members:
        member.start()
    for member in members:
        member.join()
    assert not errors
    assert_followed(run, model, x, before)


def test_a_change_that_another_graph_followed_and_that_was_taken_back() -> None:
    """Both graphs share one pack; the second sees the weights as it saw them last."""
    model = model_of()
    run = torch.compile(
        model, backend=fxfusion.ffn_fusion, dynamic=False, options={"compiler": "eager", "strict": True}
    )
    short, long = tokens(seq=2, dtype=torch.float32), tokens(seq=5, dtype=torch.float32)
    with torch.no_grad():
        run(short), run(long)
        assert live_packs() == 1
        kept = gate(model).detach().clone()
        gate(model).data.mul_(3)
        assert_exact(run(short), parallel_form(model, short), torch.float32)
        gate(model).data.copy_(kept)
        assert_exact(run(long), parallel_form(model, long), torch.float32)


def test_a_write_to_one_element_needs_refresh() -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        before = run(x)
        gate(model).data.view(-1)[gate(model).numel() // 3] += 5
        assert torch.equal(run(x), before), "seen: then the documents can promise more"
        assert fxfusion.refresh(model) == 1
        assert_followed(run, model, x, before)
        assert fxfusion.refresh(model_of()) == 0


# --- other tensors and other memory -----------------------------------------------------------------------


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("grad", [True, False])
def test_swapped_tensors(compiler: str, grad: bool) -> None:
    """`swap_tensors` refuses tensors that somebody refers to weakly: nobody here does, reports included."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, x = model_of(), tokens(dtype=torch.float32)
        run = compiled(model, compiler)
        with torch.set_grad_enabled(grad):
            before = run(x).detach()
            assert fxfusion.last_reports()[-1].groups
            model.load_state_dict(other_state(model))
            assert_followed(run, model, x, before)
            other = nn.Parameter(gate(model).detach() * 3)
            before = run(x).detach()
            torch.utils.swap_tensors(gate(model), other)
            assert_followed(run, model, x, before)
            del other
            model.to(torch.float64)
            assert_exact(run(x.double()).detach(), parallel_form(model, x.double()).detach(), torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_packs_of_a_dtype_that_the_model_left_are_freed() -> None:
    """Even where somebody holds the memory that the weights were in."""
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        kept = [weight.data for weight in model.parameters()]
        old = [packed for packed in packing._registry.values() if packed.alive]
        model.to(torch.bfloat16)
        run(x.bfloat16())
    assert kept and live_packs() == 1
    held = {tensor.dtype for packed in old for tensor in packed.tensors}
    assert torch.float32 not in held


def test_packs_die_at_a_collection_though_their_graph_lives() -> None:
    """One graph serves modules of one class, so it outlives each of them."""
    models, x = [model_of(), model_of()], tokens(dtype=torch.float32)

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)

    run = torch.compile(forward, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "strict": True})
    with torch.no_grad():
        for model in models:
            run(model, x)
    found = [packed for packed in packing._registry.values() if packed.alive]
    assert len(found) == 2
    del models[0], model
    gc.collect()
    assert sorted(len(packed.tensors) for packed in found)[0] == 0, "freed by the collection itself"
    assert live_packs() == 1


# --- gradients, transforms, threads -----------------------------------------------------------------------


def test_weights_that_come_to_need_a_gradient_get_one() -> None:
    """Dynamo guards on it; without its guard it is an error, never a gradient that is missing."""
    model, x = model_of().requires_grad_(False), tokens(dtype=torch.float32)
    run = compiled(model, "aot_eager")
    run(x)
    assert live_packs() == 1
    model.requires_grad_(True)
    run(x).sum().backward()
    assert all(weight.grad is not None for weight in model.parameters())
    held = [weight.detach() for weight in model.parameters()]
    graph = packing.FusedCallable(lambda *_: None, SimpleNamespace(tensors=lambda _: []))  # type: ignore[arg-type]
    graph(*held)
    with pytest.raises(GradientError, match="gradients are recorded"):
        graph(*model.parameters())
    with torch.no_grad():
        graph(*model.parameters())


def test_gradients_inside_a_graph_are_recorded_on_the_members() -> None:
    model, x = model_of(), tokens(dtype=torch.float32)

    def inside(x: Tensor) -> Tensor:
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        found = torch.compile(
            inside, backend=fxfusion.ffn_fusion, options={"compiler": "eager", "form": "prepacked", "strict": True}
        )(x)
    assert fxfusion.last_reports()[-1].groups[0].form == "members" and live_packs() == 0
    assert found.requires_grad
    found.sum().backward()
    assert gate(model).grad is not None


def test_functional_call_with_other_weights_each_time() -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        for scale in (1.1, 1.2, 1.3):
            weights = {f"_orig_mod.{name}": value * scale for name, value in model.named_parameters()}
            twin = copy.deepcopy(model)
            twin.load_state_dict({name: value * scale for name, value in model.named_parameters()})
            assert_exact(functional_call(run, weights, (x,)), parallel_form(twin, x), torch.float32)
            del weights
        assert live_packs() == 0, "the weights are gone"


@pytest.mark.parametrize("called_before", [True, False])
def test_vmap_over_a_compiled_model(called_before: bool) -> None:
    """Dynamo compiles nothing that a transform calls from outside: the model computes it, on weights as they are."""
    model, x = model_of(), tokens(batch=3, dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        if called_before:
            run(x)
        before = len(fxfusion.last_reports())
        gate(model).mul_(3)
        assert error_of(torch.vmap(run)(x), model(x)) < 1e-6
        assert error_of(model(x), parallel_form(model, x)) > 1e-3
        assert len(fxfusion.last_reports()) == before


def test_threads_compute_a_changed_pack_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad():
        run(x)
        gate(model).mul_(3)
        wanted = parallel_form(model, x)
    computed: list[int] = []
    compute, barrier = packing.PackedWeights._compute, threading.Barrier(4)

    def count(self: Any, sources: Any) -> None:
        computed.append(1)
        compute(self, sources)

    monkeypatch.setattr(packing.PackedWeights, "_compute", count)
    results: list[Tensor] = []

    def call() -> None:
        with torch.no_grad():
            barrier.wait()
            results.append(run(x))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(computed) == 1 and len(results) == 4
    for result in results:
        assert_exact(result, wanted, torch.float32)


# --- other devices: the same logic, forced on the CPU ------------------------------------------------------


def test_devices_see_dense_writes_one_call_later_and_warn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_look, "_MEMORY", torch.device("meta"))  # nothing is read at its address
    model, x = model_of(), tokens(dtype=torch.float32)
    run = compiled(model)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxfusion"):
        before = run(x)
        assert torch.equal(run(x), before) and not caplog.records
        gate(model).data.mul_(3)
        run(x)  # asks
        wanted = parallel_form(model, x)
        assert_exact(run(x), wanted, torch.float32)
        assert "torch does not count" in caplog.text and len(caplog.records) == 1
        assert_exact(run(x), wanted, torch.float32)
        assert len(caplog.records) == 1
        gate(model).mul_(2)  # counted: seen at once
        assert_exact(run(x), parallel_form(model, x), torch.float32)
