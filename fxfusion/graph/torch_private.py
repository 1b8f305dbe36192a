"""The only file that touches private names of torch.

Each function says what it relies on; `self_test()` calls every one of them, so a torch release that
moves a name fails here, with the name, and nowhere else.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import ShortenTraceback
from torch._dynamo.source import AttrSource, ConstantSource
from torch._guards import TracingContext
from torch._inductor import list_mode_options as _list_mode_options
from torch._logging import trace_structured
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FakeTensor", "FakeTensorMode", "HigherOrderOperator", "OpOverload", "OpOverloadPacket", "TorchDispatchMode"]

FOREACH = {name: getattr(torch, f"_foreach_{name}_") for name in ("add", "copy", "mul")}
"""Writes of many tensors at once, as optimizers do them: `FOREACH["add"]([a, b], 1.0)`."""


def compile_with_inductor(
    gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a Dynamo graph with Inductor. `mode` is one of `inductor_modes()`, `options` its config keys."""
    from torch._inductor.compile_fx import compile_fx

    patches = {**(_list_mode_options(mode) if mode else {}), **options}
    return cast(Callable[..., Any], compile_fx(gm, list(inputs), config_patches=patches or None))


def inductor_modes() -> tuple[str, ...]:
    """The values that `torch.compile(mode=)` accepts for Inductor."""
    return ("default", *(name for name in _list_mode_options() if name != "default"))


def inductor_option_names() -> frozenset[str]:
    """Every key that Inductor's `config_patches` accepts."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_draws_as_eager(options: Mapping[str, Any]) -> bool:
    """Whether Inductor, with these config keys, draws the random numbers that eager mode would draw."""
    from torch._inductor import config

    return bool(options.get("fallback_random", config.fallback_random))


def backend_named(name: str) -> Callable[..., Any]:
    """A registered Dynamo backend, such as `eager` or `aot_eager`."""
    found: Callable[..., Any] = lookup_backend(name)
    return found


def be_registered(name: str, backend: Callable[..., Any]) -> None:
    """Let Dynamo know a backend by name, also where it was given as a function.

    After a compile Dynamo drops its weak references to the weights for registered backends only, and
    `torch.utils.swap_tensors` refuses what somebody refers to weakly.
    """
    from torch._dynamo.backends import registry

    if name not in registry._COMPILER_FNS:
        registry.register_backend(backend, name=name)


@functools.cache
def dispatcher_operations() -> frozenset[str]:
    """Names, such as `aten::add.Tensor`, of what torch's dispatcher knows: without the built-ins of TorchScript."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def is_export_guard(node: fx.Node) -> bool:
    """Whether the node calls what `torch.export` puts before a graph: it checks the inputs and returns nothing."""
    from torch.export._unlift import GuardsFn

    owner = node.graph.owning_module
    return node.op == "call_module" and owner is not None and type(owner.get_submodule(str(node.target))) is GuardsFn


def placeholder_source(node: fx.Node) -> Any:
    """Where Dynamo found a placeholder's value, or None outside Dynamo."""
    return getattr(node, "_dynamo_source", None)


def is_module_state(node: fx.Node) -> bool:
    """Whether a Dynamo placeholder is a parameter or buffer of a module (by source, not by name)."""
    source = placeholder_source(node)
    if source is None:
        return False
    if "NN_MODULE" not in source.guard_source.name and "FSDP" not in source.guard_source.name:
        return False
    return "_parameters[" in source.name or "_buffers[" in source.name


def held_number(node: fx.Node) -> tuple[torch.SymFloat, float] | None:
    """A float that Dynamo, at work now, read off a module, another object or a global variable and made an input of the
    graph, and what it is. None for a number that the caller passes.

    `node` reads it from its input, a tensor of no axes.
    """
    if node.op != "call_method" or node.target != "item" or TracingContext.try_get() is None:
        return None
    source = placeholder_source(node.all_input_nodes[0])
    if source is None or is_module_state(node.all_input_nodes[0]) or not _is_held(source):
        return None
    number = node.meta.get("example_value")
    if not isinstance(number, torch.SymFloat) or number.node.hint is None:
        return None
    return number, float(number.node.hint)


def _is_held(source: Any) -> bool:
    """Whether a value is no argument of the call, nor an item of one."""
    if source.guard_source.name != "LOCAL":
        return True
    while not isinstance(source, AttrSource):
        if not hasattr(source, "base"):
            return False
        source = source.base
    return True


def is_batched(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether a tensor belongs to a level of `torch.vmap`. Its shape is that of one example."""
    return isinstance(value, torch.Tensor) and bool(torch._C._functorch.is_batchedtensor(value))


def is_fsdp_managed(node: fx.Node) -> bool:
    """Whether Dynamo found the placeholder's value in a module that FSDP manages."""
    source = placeholder_source(node)
    return source is not None and "FSDP" in source.guard_source.name


def compiled_model() -> Any:
    """The model or function that the user compiled and now calls for the first time: the outermost one on the stack.

    None where Dynamo's wrapper is not found there.
    """
    frame, found = sys._getframe(), None
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_globals.get("__name__") == "torch._dynamo.eval_frame":
            found = frame.f_locals.get("fn", found)
        frame = frame.f_back  # type: ignore[assignment]
    found = inspect.unwrap(found) if callable(found) else found
    return getattr(found, "__self__", found)


def ends_at_graph_break(gm: fx.GraphModule) -> bool:
    """Whether Dynamo stopped this graph at a graph break, so that more graphs of the model follow."""
    return bool(getattr(getattr(gm, "compile_subgraph_reason", None), "graph_break", False))


def copy_dynamo_facts(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Carry over what Dynamo, AOTAutograd and torch.export keep beside a graph and its placeholders.

    Placeholders are paired by position. Without `dynamo_compile_id` in `gm.meta` AOTAutograd sees no
    static inputs and CUDA graphs would copy every weight. Notes of Dynamo's own, which refer weakly to the user's
    weights, are left behind (it takes them off its own graph after the compile; `be_registered` says why).
    """
    new.meta.update(old.meta)
    new.graph.set_codegen(copy.copy(old.graph._codegen))  # how exported graphs take and return pytrees
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    before = [node for node in old.graph.nodes if node.op == "placeholder"]
    after = [node for node in new.graph.nodes if node.op == "placeholder"]
    for old_node, new_node in zip(before, after, strict=False):
        if hasattr(old_node, "_dynamo_source"):
            new_node._dynamo_source = old_node._dynamo_source
        new_node.meta.pop("grapharg", None)


def mark_static_weight(node: fx.Node) -> None:
    """Dress a new placeholder as a weight, so that AOTAutograd and CUDA graphs treat it as static."""
    node._dynamo_source = ConstantSource(source_name=f"fxfusion_{node.name}")
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def as_backend_fake(value: torch.Tensor) -> torch.Tensor:
    """The tensor as AOTAutograd wants an input that Dynamo does not know: fake, of static shape.

    Outside a Dynamo compile there is no mode to fake it in, and the tensor itself is returned.
    """
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return value
    fake: torch.Tensor = context.fake_mode.from_tensor(value, static_shapes=True)
    return fake


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake tensor mode that the graph's example values belong to, or None."""
    return next(iter(fake_modes_of(graph)), None)


def fake_modes_of(graph: fx.Graph) -> Iterator[Any]:
    """The fake tensor mode of each example value (`make_fx` on real tensors gives each value its own)."""
    for node in graph.nodes:
        for key in ("example_value", "val"):
            value = node.meta.get(key)
            if isinstance(value, FakeTensor):
                yield value.fake_mode


def size_hint(size: Any) -> int:
    """A plain integer for a size: itself, the hint of a SymInt, or 7 where torch has no hint."""
    if isinstance(size, int):
        return size
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if hint is not None else 7


def lazy_graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that writes its Python code when it is first called, not at every edit."""
    from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

    with _use_lazy_graph_module(True):
        made: fx.GraphModule = _make_graph_module(root, graph)
    return made


class StorageWatch:
    """Tells when the storage of one of some tensors is gone, without keeping any alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._refs = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._handles = [ref.cdata for ref in self._refs]

    def any_expired(self) -> bool:
        return any(map(torch.UntypedStorage._expired, self._handles))


def as_user_error(error: Exception) -> Exception:
    """The error, of its own type still, dressed so that Dynamo passes it on to the user as it is.

    Other exceptions of a backend reach the user as `BackendCompilerFailed`.
    """
    kind = type(error)

    def start(self: Any, *args: Any) -> None:
        ShortenTraceback.__init__(self, *args, first_useful_frame=None)

    names = {"__init__": start, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    dressed: Exception = type(kind.__name__, (kind, ShortenTraceback), names)(*error.args)
    return dressed


def emit_artifact(name: str, text: str) -> None:
    """Put a text into the structured trace (`TORCH_TRACE`), where `tlparse` shows it."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


@contextlib.contextmanager
def outside_fake_mode() -> Iterator[None]:
    """Run on real tensors although Dynamo has a fake mode active while it calls a backend."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        yield


def reset_dynamo() -> None:
    """Forget every compiled graph (tests and benchmarks)."""
    import torch._dynamo

    torch._dynamo.reset()


def hooks_in(module: torch.nn.Module) -> list[str]:
    """Paths, from the module down, of what has forward or backward hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [path for path, part in module.named_modules() if any(vars(part).get(kind) for kind in kinds)]


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs linear weights of this dtype on this processor."""
    if not (torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def onednn_pack(weight: torch.Tensor, tokens: int) -> torch.Tensor:
    """A weight `[out, in]` as an opaque tensor in the layout that oneDNN likes for so many tokens."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, tokens)
    return packed


def onednn_memory(packed: torch.Tensor) -> tuple[int, int]:
    """Address and size [bytes] of what `onednn_pack` made."""
    return int(torch.ops.mkldnn.data_ptr(packed)), int(torch.ops.mkldnn._nbytes(packed))


def onednn_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear` on a packed weight."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return result
