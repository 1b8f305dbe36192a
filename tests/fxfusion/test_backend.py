"""The torch.compile backend: what reaches the compiler, gradients, refusals, fall back, strictness."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxfusion
from fxfusion import FusionPlan, RefusalCode, ffn_fusion, last_reports
from fxfusion.compiler.packing import live_packs
from fxfusion.errors import MissingWeightsError, NotFusedError
from fxfusion.graph import ops
from tests.helpers import Plain, assert_exact, error_of, parallel_form, randomise, refusal_with, stack, tokens

pytestmark = pytest.mark.usefixtures("clean_dynamo")


def compiled(model: Callable[..., Any], compiler: str = "eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=ffn_fusion, options={"compiler": compiler, **options})


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    got = gradients(model, run(x).square().sum())
    wanted = gradients(model, parallel_form(model, x).square().sum())
    for name, gradient in wanted.items():
        assert got[name] is not None, f"{name} got no gradient"
        assert_exact(got[name], gradient, torch.float64, gradient=True)


# --- what is compiled ---------------------------------------------------------------------------------


def test_vmap_in_the_model_survives() -> None:
    """Models make attention masks with vmap; the nodes that enter and leave it have no readers."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffns = stack()

        def forward(self, x: Tensor) -> Tensor:
            positions = torch.arange(x.shape[1])
            mask = torch.vmap(torch.vmap(lambda a, b: a <= b, (None, 0)), (0, None))(positions, positions)
            return self.ffns(x) + mask.sum()

    model, x = Masked(), tokens()
    mask = torch.ones(x.shape[1], x.shape[1]).triu().sum()
    assert_exact(compiled(model, strict=True)(x), parallel_form(model.ffns, x) + mask, torch.float64)
    assert len(last_reports()[-1].groups) == 1


class Mapped(nn.Module):
    """A stack that sees one example at a time, or one token."""

    def __init__(self, levels: int = 1) -> None:
        super().__init__()
        self.ffns, self.levels = stack(), levels

    def forward(self, x: Tensor) -> Tensor:
        run = torch.vmap(self.ffns.forward)
        return torch.vmap(run)(x) if self.levels == 2 else run(x)


@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("form", ["auto", "members", "concatenated", "prepacked"])
def test_ffns_inside_vmap_fuse(form: str, levels: int) -> None:
    model, x = Mapped(levels), tokens()
    with torch.no_grad():
        result = compiled(model, strict=True, verify="numeric", form=form)(x)
    assert_exact(result, parallel_form(model.ffns, x), torch.float64)
    (group,) = last_reports()[-1].groups
    assert len(group.members) == 3 and group.form == ("members" if form == "members" else "concatenated")
    assert len(fxfusion.explain(model, x).groups) == 1


def test_gradients_of_ffns_inside_vmap() -> None:
    model, x = Mapped(), tokens()
    run = compiled(model, strict=True)
    got = gradients(model.ffns, run(x).square().sum())
    for name, wanted in gradients(model.ffns, parallel_form(model.ffns, x).square().sum()).items():
        assert_exact(got[name], wanted, torch.float64, gradient=True)
    assert len(last_reports()[-1].groups) == 1


class ByLayer(nn.Module):
    """Layers of one class, each of two FFNs, or of one."""

    def __init__(self, per_layer: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(stack(count=per_layer) for _ in range(3))
        for seed, layer in enumerate(self.layers):
            randomise(layer, seed)

    def compile_each(self, **options: Any) -> None:
        for layer in self.layers:
            layer.compile(backend=ffn_fusion, options={"compiler": "eager", **options})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def parallel(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = parallel_form(layer, x)
        return x


@pytest.mark.parametrize(
    "choice", [{}, {"plan": {"groups": [[0, 1]]}}, {"plan": {"groups": [["layers.0.ffn", "layers.1.ffn"]]}}]
)
def test_layers_compiled_one_by_one_fuse_their_own_ffns(choice: Any) -> None:
    """One compiled graph serves all layers, each with packed weights of its own, which follow the optimizer."""
    model, x = ByLayer(2), tokens()
    model.compile_each(strict=True, **choice)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(3):
        with torch.no_grad():
            assert_exact(model(x), model.parallel(x), torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    reports = last_reports()
    assert len(reports) == 3, "one for inference, and with gradients two: what comes in has one, or none"
    assert all([len(group.members) for group in report.groups] == [2] for report in reports)


def test_layers_of_one_ffn_compiled_one_by_one_compute_what_they_did() -> None:
    model, x = ByLayer(1), tokens()
    wanted = model(x)
    model.compile_each(strict=True)
    assert torch.equal(model(x), wanted)
    for report in last_reports():
        refusal_with(report.refusals, RefusalCode.STREAM_READ, "no neighbour to fuse with")


@pytest.mark.parametrize("choice", [{"plan": {"groups": [[1, 2]]}}, {"policy": {"windows": [[1, 2]]}}])
def test_a_plan_over_several_layers_does_not_fit_layers_compiled_one_by_one(choice: Any) -> None:
    model, x = ByLayer(1), tokens()
    wanted = model(x)
    model.compile_each(**choice)
    assert torch.equal(model(x), wanted)
    refusal_with(last_reports()[-1].refusals, RefusalCode.PLAN_ABSENT, "none of them holds an FFN of this graph")
    torch._dynamo.reset()
    model.compile_each(strict=True, **choice)
    with pytest.raises(NotFusedError, match="none of them holds an FFN of this graph"):
        model(x)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("norm", ["fold", "last"])
def test_fused_forward_and_gradients(compiler: str, norm: Any) -> None:
    model, x = stack(Plain, nn.LayerNorm, widths=(12, 20, 4)), tokens().requires_grad_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = compiled(model, compiler, policy={"norm": norm}, strict=True)
    assert_exact(run(x), parallel_form(model, x, norm=norm), torch.float64)
    if norm == "fold":
        assert_gradients(model, run, x)
    got, wanted = run(x).sum(), parallel_form(model, x, norm=norm).sum()
    assert_exact(torch.autograd.grad(got, x)[0], torch.autograd.grad(wanted, x)[0], torch.float64, gradient=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_training_steps_and_accumulation() -> None:
    model, twin, x = stack(Plain, nn.LayerNorm), stack(Plain, nn.LayerNorm), tokens()
    run = compiled(model, "aot_eager", strict=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    for _ in range(3):
        for part in (x, x * 0.5):  # two micro-batches: gradients add up
            run(part).square().mean().backward()
            parallel_form(twin, part).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert error_of(one, other) < 1e-8
    assert_exact(run(x), parallel_form(model, x), torch.float64)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_write_between_forward_and_backward_raises_as_in_eager(compiler: str) -> None:
    model, x = stack(), tokens()
    for run in (model, compiled(model, compiler, strict=True)):
        loss = run(x).sum()
        with torch.no_grad():
            model.layers[1].ffn.down.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("form", ["auto", "concatenated"])
def test_second_derivatives_are_native(form: str) -> None:
    model, x = stack(), tokens().requires_grad_()
    found = []
    for result in (compiled(model, form=form, strict=True)(x), parallel_form(model, x)):
        first = torch.autograd.grad(result.square().sum(), model.layers[0].ffn.gate.weight, create_graph=True)
        found.append(torch.autograd.grad(first[0].square().sum(), model.layers[1].ffn.down.weight)[0])
    assert_exact(found[0], found[1], torch.float64, gradient=True)


@pytest.mark.parametrize("form", ["auto", "concatenated", "prepacked"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_a_compiled_model(form: str, reentrant: bool) -> None:
    """Nothing is computed at the first call alone, so the second saves the same tensors."""
    model = stack()
    run, gradients_of_x = compiled(model, "aot_eager", form=form, strict=True), []
    for function in (lambda x: checkpoint(run, x, use_reentrant=reentrant), lambda x: parallel_form(model, x)):
        x = tokens().requires_grad_()
        function(x).square().sum().backward()
        gradients_of_x.append(x.grad)
    assert_exact(gradients_of_x[0], gradients_of_x[1], torch.float64, gradient=True)


def test_no_concatenation_of_weights_in_the_compiled_graph() -> None:
    model, x = stack(), tokens()
    run = compiled(model, strict=True)
    with torch.no_grad():
        run(x)
    after = last_reports()[-1].after
    assert after is not None
    names = [ops.op_name(node) for node in after.graph.nodes]
    assert "cat" not in names and names.count("linear") == 3
    assert [n.name for n in after.graph.nodes if n.op == "placeholder"][-3:] == [
        "packed_0_0",
        "packed_0_1",
        "packed_0_2",
    ]


@torch.no_grad()
def test_regional_compile_of_parts_of_a_model() -> None:
    parts, x = [stack(seed=1), stack(seed=2)], tokens()
    runs = [compiled(part, strict=True) for part in parts]
    for _ in range(2):
        wanted = parallel_form(parts[1], parallel_form(parts[0], x))
        assert_exact(runs[1](runs[0](x)), wanted, torch.float64)
    assert live_packs() == 2


def test_nothing_to_fuse_is_bit_equal_and_untouched() -> None:
    model, x = stack(count=1), tokens()
    plain = torch.compile(model, backend="aot_eager")(x)
    torch._dynamo.reset()
    assert torch.equal(compiled(model, "aot_eager", strict=True)(x), plain)
    refusal_with(last_reports()[-1].refusals, RefusalCode.STREAM_READ)
    assert last_reports()[-1].after is last_reports()[-1].before


# --- fall back and strict -----------------------------------------------------------------------------

STEPS = [
    "fxfusion.backend.capture_dynamo",
    "fxfusion.compiler.pipeline.normalising_passes",
    "fxfusion.compiler.pipeline.match_residual",
    "fxfusion.compiler.pipeline.find_chains",
    "fxfusion.compiler.pipeline.plan_by_policy",
    "fxfusion.passes.parallelise.Parallelise.run",
    "fxfusion.passes.concatenate.Concatenate.run",
    "fxfusion.passes.lift_weights.LiftWeights.run",
    "fxfusion.compiler.packing.PackedWeights.__init__",
    "fxfusion.backend.as_backend_fake",
]


@pytest.mark.parametrize("step", STEPS)
def test_a_failing_step_falls_back_with_one_warning(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory for this")

    monkeypatch.setattr(step, fail)
    model, x = stack(), tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), caplog.at_level(logging.WARNING, "fxfusion"):
        assert torch.equal(compiled(model)(x), model(x))
    warnings = [record.getMessage() for record in caplog.records if record.name == "fxfusion"]
    assert len(warnings) == 1 and "no memory for this" in warnings[0] and "unfused" in warnings[0]
    assert "no memory for this" in last_reports()[-1].notes[0]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="no memory for this"):
        compiled(model, strict=True)(x)


def test_a_plan_that_does_not_fit_warns_or_raises(caplog: pytest.LogCaptureFixture) -> None:
    model, x = stack(), tokens()
    plan = FusionPlan(groups=[[7, 8]])
    assert torch.equal(compiled(model, plan=plan)(x), model(x))
    assert "1 planned groups were not fused" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(NotFusedError, match="does not fit"):
        compiled(model, plan=plan, strict=True)(x)
    torch._dynamo.reset()
    run = compiled(model, plan={"groups": [[1, 2]]}, strict=True)
    assert_exact(run(x), parallel_form(model, x, [[1, 2]]), torch.float64)


def test_a_plan_reaches_over_a_graph_break(caplog: pytest.LogCaptureFixture) -> None:
    """Each part fuses its own groups; only a group that is there in part is at fault."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = stack(count=5).layers

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:3]:
                x = layer(x)
            torch._dynamo.graph_break()
            for layer in self.layers[3:]:
                x = layer(x)
            return x

    model, x = Broken(), tokens()
    run = compiled(model, plan={"groups": [[1, 2], [3, 4]]}, strict=True)
    assert_exact(run(x), parallel_form(model, x, [[1, 2], [3, 4]]), torch.float64)
    assert "not fused" not in caplog.text
    torch._dynamo.reset()
    with pytest.raises(NotFusedError, match="group 0"):
        compiled(model, plan={"groups": [[2, 3]]}, strict=True)(x)


def test_running_without_weights_says_so() -> None:
    model = stack().to("meta")
    with torch.no_grad(), pytest.raises(MissingWeightsError, match="meta device"):
        compiled(model)(tokens().to("meta"))


# --- entry point --------------------------------------------------------------------------------------


def test_entry_point_is_the_undecorated_function() -> None:
    """A decorated function would be registered twice (torch raises "duplicate name")."""
    from torch._dynamo.backends.registry import _BACKENDS, list_backends

    group = "torch_dynamo_backends"
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    listed = project["project"]["entry-points"][group]
    assert list(listed) == ["ffn_fusion"]
    assert EntryPoint("ffn_fusion", listed["ffn_fusion"], group).load() is fxfusion.ffn_fusion
    list_backends(exclude_tags=())
    entry = _BACKENDS.get("ffn_fusion")  # None where fxfusion is installed nowhere: its path is what counts
    assert entry is None or isinstance(entry, EntryPoint) or entry is fxfusion.ffn_fusion
