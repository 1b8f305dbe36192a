"""Run a graph node by node in eager mode, and note all that can be seen of it.

Seen are the outputs, the inputs and weights that it wrote, values that the caller asks to watch, and what operations
read that are not run. Not run is what `effects` does not understand (it might do anything, twice) and what fails on the
inputs at hand: their results are made up, the same ones in every graph that has a node of that name, and `not_run` says
why. So a graph can always be run to its end, and every mode that it switches on is switched off again.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.effects import GraphEffects, effect_of, records_gradients
from fxfusion.graph.torch_private import outside_fake_mode, size_hint

Reads = Mapping[str, Mapping[str, str]]
"""By the name of a node, which values it reads in place of which, by name."""
_AUTOCAST = ("_enter_autocast", "_exit_autocast")
_FLOAT_CASTS = ("float", "half", "bfloat16")


@dataclass(slots=True)
class Seen:
    """What one run showed. `values` by what they are; `not_run`: why the result of a node was made up."""

    values: dict[str, Any] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)


def observe(
    gm: fx.GraphModule,
    tensors: Mapping[str, Any],
    *,
    reads: Reads | None = None,
    written: Collection[str] = (),
    watch: Mapping[str, str] | None = None,
    like: Seen | None = None,
    exact: bool = False,
    seed: int | None = None,
) -> Seen:
    """Run the graph on values for its inputs and weights, by node name.

    `reads`: what nodes read in place of what the graph says.
    `written`: which tensors are copied first, and noted as they are in the end (see `written_inputs`).
    `watch`: names of nodes whose values are wanted, and what to call them.
    `like`: the run that this one is compared with. What it did not run is not run here, and watched values are noted
    and then replaced by its own, so that every part is judged on the same inputs.
    `exact`: in float64, without autocast and casts; what `like` drew is drawn.
    `seed`: of the random numbers; None goes on from the caller's, which are left as they are.
    """
    tensors = detached(tensors, written)
    kind = _InFloat64 if exact else _Observer
    devices = {value.device for value in tensors.values() if isinstance(value, torch.Tensor)}
    with outside_fake_mode(), _random_numbers_kept(seed), contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad() if records_gradients(gm.graph) else torch.no_grad())
        for device in {device.type for device in devices} if exact else ():
            stack.enter_context(torch.autocast(device, enabled=False))
        return kind(gm, tensors, watch or {}, like, reads or {}).observed(written)


def written_inputs(graph: fx.Graph) -> frozenset[str]:
    """Names of inputs and weights that understood operations write, or that may share memory with those."""
    effects = GraphEffects(graph)
    roots = {effects.root(node) for effect in effects.of.values() if not effect.unknown for node in effect.writes}
    found = (node for node in graph.nodes if node.op in ("placeholder", "get_attr"))
    return frozenset(node.name for node in found if effects.root(node) in roots)


def unknown_effects(graph: fx.Graph) -> list[str]:
    """Of each operation that is not understood, in words, what it is."""
    return list(dict.fromkeys(filter(None, (effect_of(node).unknown for node in graph.nodes))))


def detached(values: Mapping[str, Any], written: Collection[str]) -> dict[str, Any]:
    """The tensors without gradients; those that are written, and those that share memory with them, copied.

    What shared memory shares it still. A tensor without gradients also keeps autocast from remembering its cast.
    """
    hot = {_address(value) for name, value in values.items() if name in written and isinstance(value, torch.Tensor)}
    copies: dict[int, torch.UntypedStorage] = {}
    found = dict(values)
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        found[name] = value.detach()
        address = _address(value)
        if address and address in hot:
            storage = copies.setdefault(address, value.untyped_storage().clone())
            empty = torch.empty(0, dtype=value.dtype, device=value.device)
            found[name] = empty.set_(storage, value.storage_offset(), value.shape, value.stride())
        elif name in written:
            found[name] = value.detach().clone()
    return found


def leaves(value: Any) -> Iterator[Any]:
    """What nested tuples, lists and dicts hold, in order."""
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    else:
        yield value


def made_up(example: Any, name: str) -> Any:
    """A value that looks like the example: floats scatter around 0 with variance 1, truths are true, integers 0 or 1.

    The name is the seed, and no random number is drawn: `vmap` forbids that inside.
    """
    if isinstance(example, (tuple, list)):
        return tuple(made_up(item, f"{name}.{place}") for place, item in enumerate(example))
    if not isinstance(example, torch.Tensor):
        return size_hint(example) if isinstance(example, torch.SymInt) else example
    shape = [max(size_hint(size), 1) if size != 0 else 0 for size in example.shape]
    if example.dtype == torch.bool:
        return torch.ones(shape, dtype=torch.bool, device=example.device)
    wide = [*shape, 2] if example.is_complex() else shape
    place = torch.arange(math.prod(wide), dtype=torch.float64) + zlib.crc32(name.encode()) % 65536
    scattered = ((place * 12.9898).sin() * 43758.5453).frac().reshape(wide)  # in (-1, 1), dense and without a pattern
    if example.is_complex():
        return torch.view_as_complex(scattered * math.sqrt(3)).to(dtype=example.dtype, device=example.device)
    made = scattered * math.sqrt(3) if example.is_floating_point() else scattered > 0
    return made.to(dtype=example.dtype, device=example.device)


class _Observer(fx.Interpreter):
    def __init__(
        self, gm: fx.GraphModule, tensors: Mapping[str, Any], watch: Mapping[str, str], like: Seen | None, reads: Reads
    ) -> None:
        super().__init__(gm)
        named = {node.name: node for node in self.graph.nodes}
        self.reads = {named[n]: {named[old]: named[new] for old, new in each.items()} for n, each in reads.items()}
        self.wanted = {new for each in self.reads.values() for new in each.values()}
        self.kept: dict[fx.Node, Any] = {}  # what is read out of its turn
        self.tensors, self.watch, self.like = dict(tensors), watch, like
        self.seen = Seen()
        self.reached: set[fx.Node] = set()
        self.levels = 0  # of functorch: what is made inside one means nothing outside

    def observed(self, written: Collection[str]) -> Seen:
        known = {node: self.tensors[node.name] for node in self.graph.nodes if node.name in self.tensors}
        self.kept |= {node: value for node, value in known.items() if node in self.wanted}
        try:
            self.run(initial_env=known, enable_io_processing=False)
        except BaseException:
            self._leave_modes()
            raise
        for name in sorted(written):
            self._note(f"{name}, which is written,", self.tensors[name])
        return self.seen

    def _leave_modes(self) -> None:
        """Of a run that was cut short: autocast and levels of functorch are global, so what was entered is left."""
        for n in self.graph.nodes:
            if n not in self.reached and effect_of(n).switches and not effect_of(n).unknown:
                with contextlib.suppress(Exception):
                    self.compute(n)

    def run_node(self, n: fx.Node) -> Any:
        self.reached.add(n)
        if n.op == "output":
            result = super().run_node(n)
            for place, value in enumerate(leaves(result)):
                self._note(f"output {place}", value)
            return result
        value = self.kept[n] if n in self.kept else self._watched(n, self._value(n))
        if n in self.wanted:
            self.kept[n] = value
        self.levels += ops.op_name(n).endswith("_increment_nesting") - ops.op_name(n).endswith("_decrement_nesting")
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        found: tuple[Any, Any] = fx.node.map_arg((n.args, n.kwargs), partial(self._read, n))
        return found

    def _read(self, n: fx.Node, source: fx.Node) -> Any:
        """What the node gets for one of its arguments. What stands behind it is computed before its turn."""
        source = self.reads.get(n, {}).get(source, source)
        if source in self.env:
            return self.env[source]
        if source not in self.kept:
            self.kept[source] = self.compute(source)
        return self.kept[source]

    def compute(self, n: fx.Node) -> Any:
        return super().run_node(n)

    def _value(self, n: fx.Node) -> Any:
        why = effect_of(n).unknown
        if not why and self.like is not None:
            why = self.like.not_run.get(n.name, "")
        if not why:
            try:
                return self._drawn(n, self.compute(n))
            except Exception as error:
                words = (str(error).splitlines() or [""])[0]
                why = f"{ops.op_name(n) or n.target} failed: {type(error).__name__}: {words}"
        self.seen.not_run[n.name] = why
        for place, source in enumerate(ops.nodes_of((n.args, n.kwargs))):
            self._note(f"value {place} that {n.name} reads", self._read(n, source))
        return made_up(ops.example(n), n.name)

    def _drawn(self, n: fx.Node, value: Any) -> Any:
        """Note what a node made of random numbers."""
        for place, item in enumerate(leaves(value)) if effect_of(n).draws else ():
            self._note(f"value {place} that {n.name} drew", item)
        return value

    def _watched(self, n: fx.Node, value: Any) -> Any:
        label = self.watch.get(n.name)
        if label is None or self.levels or not isinstance(value, torch.Tensor):
            return value
        self._note(label, value)
        wanted = self.like.values.get(label) if self.like is not None else None
        if wanted is None or wanted.shape != value.shape:
            return value
        return value.detach().clone().copy_(wanted)

    def _note(self, what: str, value: Any) -> None:
        if not self.levels:
            self.seen.values[what] = value.detach().clone() if isinstance(value, torch.Tensor) else value


class _InFloat64(_Observer):
    """Every float in float64, casts between floats do nothing, and what the other run drew is drawn again."""

    def observed(self, written: Collection[str]) -> Seen:
        """Other weights are widened where they are read, one at a time."""
        self.tensors |= {name: _wide(self.tensors[name]) for name in written}
        return super().observed(written)

    def compute(self, n: fx.Node) -> Any:
        name = ops.op_name(n)
        if name in _AUTOCAST:
            return None
        if name in _FLOAT_CASTS:
            return _wide(self._read(n, n.all_input_nodes[0]).double())
        if n.op == "get_attr":
            return super().compute(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        try:
            return self._own(n, _wide(getattr(self, n.op)(n.target, _wide(args), _wide(kwargs))))
        except Exception:  # no kernel for float64: as it was, and rounded there
            args, kwargs = fx.node.map_arg((n.args, n.kwargs), partial(self._as_it_was, n))
            return _wide(getattr(self, n.op)(n.target, args, kwargs))

    def _value(self, n: fx.Node) -> Any:
        return _wide(super()._value(n))

    def _drawn(self, n: fx.Node, value: Any) -> Any:
        """Into the same memory, for a node may draw in place."""
        drawn = self.like.values if self.like is not None else {}
        for place, item in enumerate(leaves(value)) if effect_of(n).draws else ():
            other = drawn.get(f"value {place} that {n.name} drew")
            if isinstance(item, torch.Tensor) and isinstance(other, torch.Tensor):
                item.copy_(other)
        return super()._drawn(n, value)

    def _own(self, n: fx.Node, value: Any) -> Any:
        """A copy where a cast made one and there is nothing to cast now."""
        source = n.all_input_nodes[0] if n.all_input_nodes else n
        one, other = ops.tensor_value(source), ops.tensor_value(n)
        cast = one is not None and other is not None and one.dtype != other.dtype
        return value.clone() if cast and isinstance(value, torch.Tensor) and value is self._read(n, source) else value

    def _as_it_was(self, n: fx.Node, source: fx.Node) -> Any:
        value, example = self._read(n, source), ops.tensor_value(source)
        if isinstance(value, torch.Tensor) and example is not None and value.dtype != example.dtype:
            return value.to(example.dtype)
        return value


def _wide(value: Any) -> Any:
    """Floats, and dtypes of floats, at 64 bits."""
    if isinstance(value, torch.dtype):
        return torch.complex128 if value.is_complex else torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.Tensor):
        wanted = _wide(value.dtype)
        return value.to(wanted) if value.dtype != wanted else value
    if isinstance(value, list) or type(value) is tuple:
        return (list if isinstance(value, list) else tuple)(map(_wide, value))
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    return value


def _address(value: torch.Tensor) -> int:
    """Of the memory, 0 where a tensor has none of its own kind."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) or value.layout != torch.strided:
        return 0
    return value.untyped_storage().data_ptr()


@contextlib.contextmanager
def _random_numbers_kept(seed: int | None) -> Iterator[None]:
    used = getattr(torch.get_device_module(), "is_initialized", lambda: True)()
    with torch.random.fork_rng(devices=list(range(torch.accelerator.device_count())) if used else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield
