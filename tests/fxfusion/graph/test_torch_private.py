"""Every private name of torch that fxfusion uses, called once, so that a torch release that moves one fails here."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxfusion.errors import OptionError
from fxfusion.graph import torch_private as private
from tests.helpers import stack, tokens

TESTED = {
    "compiled_model",
    "dispatcher_operations",
    "is_export_guard",
    "StorageWatch",
    "as_backend_fake",
    "as_user_error",
    "backend_named",
    "be_registered",
    "compile_with_inductor",
    "copy_dynamo_facts",
    "emit_artifact",
    "ends_at_graph_break",
    "fake_mode_of",
    "fake_modes_of",
    "hooks_in",
    "inductor_draws_as_eager",
    "inductor_modes",
    "inductor_option_names",
    "is_fsdp_managed",
    "is_module_state",
    "lazy_graph_module",
    "mark_static_weight",
    "held_number",
    "is_batched",
    "onednn_linear",
    "onednn_memory",
    "onednn_pack",
    "onednn_packs",
    "outside_fake_mode",
    "placeholder_source",
    "reset_dynamo",
    "size_hint",
}


def test_every_function_is_tested_here() -> None:
    own = {
        name
        for name, value in vars(private).items()
        if getattr(value, "__module__", "") == private.__name__ and not name.startswith("_")
    }
    assert own - TESTED == set(), "add a test here, then the name to TESTED"
    assert TESTED - own <= {"outside_fake_mode"}, "these are gone"


@pytest.fixture
def captured() -> tuple[fx.GraphModule, list[Any]]:
    """A Dynamo graph of a model with a buffer and a dynamic length, and the inputs it was given."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack(count=1)
            self.register_buffer("offset", torch.ones(8, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.offset

    def collect(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        private_fake = private.as_backend_fake(torch.ones(3))
        assert isinstance(private_fake, private.FakeTensor) and private_fake.shape == (3,)
        with private.outside_fake_mode():
            assert torch.ones(2).sum().item() == 2.0
        found.append((gm, inputs))
        return gm.forward

    private.reset_dynamo()
    x = tokens()
    torch._dynamo.mark_dynamic(x, 1)
    torch.compile(Model(), backend=collect)(x)
    return found[0]


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def test_module_state_is_told_from_inputs(captured: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, inputs = captured
    pairs = list(zip(placeholders(gm), inputs, strict=True))
    state = [value for node, value in pairs if private.is_module_state(node)]
    others = [value for node, value in pairs if not private.is_module_state(node)]
    assert len(state) == 5 and sum(isinstance(value, nn.Parameter) for value in state) == 4
    assert sum(isinstance(value, torch.Tensor) for value in others) == 1, "the stream (and its symbolic length)"
    assert all(private.placeholder_source(node) is not None for node, _ in pairs)
    assert not any(private.is_fsdp_managed(node) for node, _ in pairs)
    plain = fx.symbolic_trace(nn.Linear(2, 2))
    assert private.placeholder_source(placeholders(plain)[0]) is None
    assert not private.is_module_state(placeholders(plain)[0])


def test_tensors_of_vmap_are_told() -> None:
    seen: list[bool] = []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.append(private.is_batched(row))
        return row

    torch.vmap(look)(tokens())
    assert seen == [True] and not private.is_batched(tokens()) and not private.is_batched(3)


def test_numbers_of_modules_are_told_from_those_of_the_caller() -> None:
    class Scaled(nn.Module):
        scale = 0.5

        def forward(self, x: torch.Tensor, factor: float) -> torch.Tensor:
            return x * self.scale * factor

    found: list[Any] = []

    def collect(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend((node, private.held_number(node)) for node in gm.graph.nodes)
        return gm.forward

    private.reset_dynamo()
    torch.compile(Scaled(), backend=collect, dynamic=True)(tokens(), 1.5)
    (node, number) = next(pair for pair in found if pair[1] is not None)
    assert node.target == "item" and number is not None and number[1] == 0.5
    assert isinstance(number[0], torch.SymFloat)
    assert sum(node.target == "item" for node, _ in found) == 2 and sum(pair[1] is not None for pair in found) == 1
    assert private.held_number(node) is None, "no compile is at work any more"


def test_fsdp_is_recognised_by_the_source(captured: tuple[fx.GraphModule, list[Any]]) -> None:
    """No process group is needed: the source's kind is enough."""
    from torch._guards import GuardSource

    names = [name for name in GuardSource.__members__ if "FSDP" in name]
    assert names, "torch renamed its FSDP guard sources"
    node = placeholders(captured[0])[1]

    class Source:
        guard_source = GuardSource[names[0]]
        name = "L['self']._parameters['weight']"

    node._dynamo_source = Source()  # type: ignore[attr-defined]
    assert private.is_fsdp_managed(node)


def test_facts_are_carried_to_a_copy(captured: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, _ = captured
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    private.copy_dynamo_facts(gm, copy)
    assert "dynamo_compile_id" in copy.meta
    assert copy._param_name_to_source is gm._param_name_to_source
    for one, other in zip(placeholders(gm), placeholders(copy), strict=True):
        assert private.placeholder_source(one) is private.placeholder_source(other)


def test_graph_breaks_are_told_from_the_end_of_a_model() -> None:
    seen: list[bool] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(private.ends_at_graph_break(gm))
        return gm.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    private.reset_dynamo()
    torch.compile(broken, backend=backend)(torch.ones(2))
    assert seen == [True, False]
    assert not private.ends_at_graph_break(fx.symbolic_trace(nn.Linear(2, 2)))


def test_static_weights_are_marked_as_dynamo_marks_parameters(captured: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, _ = captured
    of_dynamo = next(
        node for node in placeholders(gm) if node.meta.get("tensor_dict") and private.is_module_state(node)
    )
    with gm.graph.inserting_after(placeholders(gm)[-1]):
        node = gm.graph.placeholder("packed_0_0")
    private.mark_static_weight(node)
    key = "_dynamo_static_input_type"
    assert node.meta["tensor_dict"][key] == of_dynamo.meta["tensor_dict"][key] == "unguarded"
    assert "packed_0_0" in str(private.placeholder_source(node).name)


def test_fake_modes_and_sizes(captured: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, _ = captured
    assert isinstance(private.fake_mode_of(gm.graph), private.FakeTensorMode)
    assert private.fake_mode_of(fx.symbolic_trace(nn.Linear(2, 2)).graph) is None
    assert set(private.fake_modes_of(gm.graph)) == {private.fake_mode_of(gm.graph)}
    values = [node.meta["example_value"] for node in gm.graph.nodes if "example_value" in node.meta]
    sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    symbolic = [size for size in sizes if isinstance(size, torch.SymInt)]
    assert symbolic and {private.size_hint(size) for size in symbolic} == {5}
    assert private.size_hint(3) == 3
    assert private.as_backend_fake(torch.ones(3)).__class__ is torch.Tensor, "no compile is running"


def test_storage_watch_sees_a_freed_storage_and_keeps_none_alive() -> None:
    weight = nn.Parameter(torch.ones(4))
    watch = private.StorageWatch([weight])
    assert not watch.any_expired()
    kept = weight.data
    weight.data = weight.data * 2
    assert not watch.any_expired(), "somebody holds the old storage: its address cannot be reused"
    del kept
    assert watch.any_expired()
    weight = nn.Parameter(torch.ones(4))
    watch = private.StorageWatch([weight])
    del weight
    gc.collect()
    assert watch.any_expired()


def test_user_errors_keep_their_type_and_pass_through_dynamo() -> None:
    error = OptionError("unknown option 'x'")
    dressed = private.as_user_error(error)
    assert isinstance(dressed, OptionError) and str(dressed) == str(error)
    assert type(dressed).__qualname__ == "OptionError" and type(dressed).__module__ == OptionError.__module__

    def backend(gm: Any, inputs: Any) -> Any:
        raise private.as_user_error(error)

    private.reset_dynamo()
    with pytest.raises(OptionError, match="unknown option 'x'"):
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))


def test_registered_backends_leave_no_weak_reference_to_a_weight() -> None:
    def unknown(gm: fx.GraphModule, inputs: Any) -> Any:
        return gm.forward

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        private.be_registered("fxfusion_test", backend)
        private.be_registered("fxfusion_test", backend)  # again does no harm
        return gm.forward

    referred = []
    for function in (unknown, backend):
        private.reset_dynamo()
        layer = nn.Linear(2, 2)
        torch.compile(layer, backend=function)(torch.ones(1, 2))
        referred.append(bool(weakref.getweakrefs(layer.weight)))
    assert referred == [True, False]
    assert private.backend_named("fxfusion_test") is backend
    for known in (torch._dynamo.backends.registry._COMPILER_FNS, torch._dynamo.backends.registry._BACKENDS):
        del known["fxfusion_test"]


def test_lazy_modules_run_what_their_graph_says() -> None:
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    lazy, x = private.lazy_graph_module(traced, traced.graph), torch.randn(4, 2)
    assert torch.equal(lazy(x), traced(x)) and isinstance(lazy, fx.GraphModule)


def test_backends_modes_and_option_names() -> None:
    assert callable(private.backend_named("eager")) and callable(private.backend_named("aot_eager"))
    assert {"default", "reduce-overhead", "max-autotune"} <= set(private.inductor_modes())
    assert {"max_autotune", "epilogue_fusion", "freezing"} <= private.inductor_option_names()


def test_artifacts_are_offered_to_the_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(private, "trace_structured", lambda *args, **kwargs: sent.append((args, kwargs)))
    private.emit_artifact("fxfusion_x", "text")
    (args, kwargs) = sent[0]
    assert args == ("artifact",) and kwargs["metadata_fn"]() == {"name": "fxfusion_x", "encoding": "string"}
    assert kwargs["payload_fn"]() == "text"
    monkeypatch.undo()
    private.emit_artifact("fxfusion_x", "text")  # and torch takes it


@pytest.mark.compile
def test_inductor_takes_a_dynamo_graph_with_mode_and_options() -> None:
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(1)
        return private.compile_with_inductor(gm, inputs, "max-autotune-no-cudagraphs", {"max_autotune": False})

    private.reset_dynamo()
    x = torch.randn(4)
    torch.testing.assert_close(torch.compile(lambda x: x.sin() + 1, backend=backend)(x), x.sin() + 1)
    assert seen


def test_hooks_are_found_by_path() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert private.hooks_in(model) == []
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(model[1][0], register)(lambda *_: None)
        assert private.hooks_in(model) == ["1.0"]
        handle.remove()
    assert private.hooks_in(model) == []


def test_onednn_packs_and_reads_weights() -> None:
    assert private.onednn_packs(torch.float32) and not private.onednn_packs(torch.float64)
    weight, x = torch.randn(48, 20), torch.randn(3, 20)
    packed = private.onednn_pack(weight, 16)
    address, size = private.onednn_memory(packed)
    assert address > 0 and size >= weight.numel() * 4
    torch.testing.assert_close(private.onednn_linear(x, packed, None), x @ weight.T)


def test_whether_inductor_draws_as_eager_mode_does() -> None:
    assert not private.inductor_draws_as_eager({}) and private.inductor_draws_as_eager({"fallback_random": True})


def test_operations_of_the_dispatcher_are_told_from_those_of_torchscript() -> None:
    known = private.dispatcher_operations()
    assert {"aten::add.Tensor", "aten::sort"} <= known and "aten::sort.Tensor" not in known


def test_what_export_puts_before_a_graph_is_known() -> None:
    gm = torch.export.export(torch.nn.ReLU(), (torch.ones(2),)).module()
    calls = [node for node in gm.graph.nodes if node.op == "call_module"]
    assert [private.is_export_guard(node) for node in calls] == [True]
    assert not any(private.is_export_guard(node) for node in gm.graph.nodes if node.op != "call_module")


def test_the_compiled_model_is_found_while_it_is_compiled() -> None:
    found = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(private.compiled_model())
        return gm.forward

    private.reset_dynamo()
    model = torch.nn.Sequential(torch.nn.ReLU())
    torch.compile(model, backend=backend)(torch.ones(2))
    assert found == [model] and private.compiled_model() is None


def test_many_tensors_are_written_at_once() -> None:
    a, b = torch.zeros(2), torch.ones(3)
    private.FOREACH["add"]([a, b], 1.0)
    private.FOREACH["mul"]([a, b], 3.0)
    assert a.tolist() == [3, 3] and b.tolist() == [6, 6, 6]
    private.FOREACH["copy"]([a], [torch.tensor([5.0, 7.0])])
    assert a.tolist() == [5, 7]
