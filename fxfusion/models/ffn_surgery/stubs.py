"""Take the FFNs out of layers that keep their attention: the mirror image of dropping attention.

Before:  y = x + attention(norm(x));  z = y + ffn(norm'(y))
After:   y = x + attention(norm(x));  z = y + 0               no parameter of `ffn` and `norm'` is left

Which modules hold the FFN and which serve nothing else is read off the captured graph, and what stands in for the
FFN off one forward pass; the caller proves the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, fx, nn

from fxfusion.errors import SurgeryError
from fxfusion.graph import provenance
from fxfusion.graph.torch_private import hooks_in
from fxfusion.models.attention_sites import layer_list_path
from fxfusion.models.attention_surgery import run_once
from fxfusion.models.no_attention import NoAttention, NoNorm, Nothing, Returned, candidates, watch
from fxfusion.models.surgery_proof import check_same_graph, proof_tokens
from fxfusion.models.traced import TracedGraph, TracedModel


class NoFfn(NoAttention):
    """Takes the place of an FFN module that moved to another layer. Has no parameters; see `NoAttention`."""


class HasWeights(Protocol):
    """An FFN: its decoder layer, and the names of its matrices."""

    @property
    def layer(self) -> int: ...

    @property
    def large(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class FfnSite:
    """One layer's FFN. `ffn`: path of its module; `norms`: paths of the modules that serve nothing else."""

    ffn: str
    norms: tuple[str, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.ffn, *self.norms)


def find_ffn_sites(traced: TracedGraph, prefix: str, members: Iterable[HasWeights]) -> tuple[FfnSite, ...]:
    """The modules of some FFNs. `prefix`: path of the list of layers.

    Raises `SurgeryError` where an FFN is no module of its own.
    """
    found = list(members)
    layers = {member.layer for member in found}
    blocks = [block for block in traced.blocks.ffns if block.layer in layers]
    alive = traced.needed([traced.logits])
    dead = alive - traced.needed([traced.logits], blocks) | {block.after for block in blocks}
    owned: dict[str, list[fx.Node]] = {}
    for node in traced.captured.module.graph.nodes:
        if node in alive:
            for path in dict.fromkeys(provenance.enclosing_modules(node)):
                owned.setdefault(path, []).append(node)
    return tuple(_site(member, f"{prefix}.{member.layer}", owned, dead) for member in found)


def _site(member: HasWeights, layer: str, owned: Mapping[str, list[fx.Node]], dead: set[fx.Node]) -> FfnSite:
    inside = [path for path in owned if path.startswith(f"{layer}.") and dead.issuperset(owned[path])]
    outermost = [path for path in inside if not any(path.startswith(f"{other}.") for other in inside)]
    holders = [path for path in outermost if all(name.startswith(f"{path}.") for name in member.large)]
    if len(holders) != 1:
        parts = ", ".join(name.rpartition(".")[0] for name in member.large)
        raise SurgeryError(
            f"the FFN of layer {member.layer} is no module of its own ({parts} belong to {layer} itself), so it cannot "
            "leave the layer; torch.compile with the same plan needs no module"
        )
    return FfnSite(holders[0], tuple(path for path in outermost if path != holders[0]))


@dataclass(slots=True)
class FfnStubs:
    """What stands in for FFNs. `gone`: the modules that were replaced, by path in the unfused model."""

    model: nn.Module
    returned: Mapping[str, Returned]
    gone: dict[str, nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, sites: Iterable[FfnSite], ids: Tensor) -> FfnStubs:
        """Look at what the FFNs return. Raises `SurgeryError` for what no stub can stand in for, and for hooks."""
        found = list(sites)
        for path in (path for site in found for path in site.paths):
            for where in hooks_in(model.get_submodule(path)):
                name = f"{path}.{where}".rstrip(".")
                raise SurgeryError(f"{name} has hooks, which would be lost with its FFN: remove them first")
        return cls(model, watch(model, [site.ffn for site in found], lambda: run_once(model, ids)) if found else {})

    def put(self, sites: Iterable[FfnSite], member: Mapping[str, Iterable[str]], prove: Callable[[], object]) -> None:
        """Replace the modules of some FFNs by the first stand-ins with which `prove` passes.

        `member`: for each FFN's path the parameters that moved: no other may be lost. Raises `SurgeryError` where
        there is one, or no stand-in will do; the model is then as it was.
        """
        wanted = list(sites)
        for site in wanted:
            self._refuse_others(site, set(member[site.ffn]))
        tried = []
        for nothing in candidates(self.returned[site.ffn] for site in wanted):
            with ExitStack() as trial:
                replaced = self._replace(wanted, nothing, trial)
                try:
                    prove()
                except Exception as error:
                    first_line, *_ = f"{error}".split("\n")
                    tried.append(f"{nothing}: {type(error).__name__}: {first_line}")
                    continue
                trial.pop_all()
                self.gone |= replaced
                return
        names = ", ".join(site.ffn for site in wanted)
        raise SurgeryError(f"nothing can stand in for {names}; tried {'; '.join(tried)}")

    def give_back(self) -> None:
        """The modules in their places again; the model has all its layers."""
        put_modules(self.model, self.gone)
        self.gone.clear()

    def _replace(self, sites: Iterable[FfnSite], nothing: Nothing, undo: ExitStack) -> dict[str, nn.Module]:
        replaced: dict[str, nn.Module] = {}
        for site in sites:
            for path in site.paths:
                own = replaced[path] = self.model.get_submodule(path)
                stub = NoFfn(own, self.returned[path], nothing) if path == site.ffn else NoNorm(own)
                undo.callback(self.model.set_submodule, path, own)
                self.model.set_submodule(path, stub.train(own.training))
        return replaced

    def _refuse_others(self, site: FfnSite, moved: set[str]) -> None:
        for path in site.paths:
            for name in _tensors_of(self.model, path):
                if name not in moved:
                    raise SurgeryError(f"{name} is no part of the FFN that moves, and would be lost")


def put_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules into their places, by path, in the mode of what stands there: the model may have changed its own."""
    for path, module in modules.items():
        model.set_submodule(path, module.train(model.get_submodule(path).training))


@dataclass(frozen=True, slots=True)
class _Weights:
    layer: int
    large: tuple[str, ...]


def drop_ffns(model: nn.Module, layers: Iterable[int]) -> None:
    """Take the FFNs of some layers out of a model on the meta device, for good, proved by its graph.

    Raises `SurgeryError` for a layer without an FFN that is understood; the model is then as it was.
    """
    ids, wanted = proof_tokens(model), set(layers)
    traced = TracedModel(model).graph(ids)
    blocks = [block for block in traced.blocks.ffns if block.layer in wanted]
    if unknown := wanted - {block.layer for block in blocks}:
        raise SurgeryError(f"layer {min(unknown)} has no FFN that is understood")
    names = {id(value): name for name, value in model.named_parameters()}
    alive = traced.needed([traced.logits])
    found = []
    for block in blocks:
        read = [node for dead in alive - traced.needed([traced.logits], [block]) for node in dead.all_input_nodes]
        values = (traced.captured.values.get(node.name) for node in read)
        large = {names[id(value)] for value in values if value is not None and value.dim() > 1 and id(value) in names}
        found.append(_Weights(block.layer, tuple(sorted(large))))
    sites = find_ffn_sites(traced, layer_list_path(traced), found)
    own = {site.ffn: [name for path in site.paths for name in _tensors_of(model, path)] for site in sites}
    FfnStubs.of(model, sites, ids).put(sites, own, lambda: check_same_graph(model, traced, blocks, ids))


def _tensors_of(model: nn.Module, path: str) -> list[str]:
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers())]
