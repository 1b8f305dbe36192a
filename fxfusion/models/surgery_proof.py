"""Proof that a model which lost some attention is the intact one without those mixers, and caches rightly.

Two witnesses, neither of which knows the changed modules: the graph of the intact model with the mixers taken out,
which says what the changed one must compute; and its own computation without a cache, which says what it must compute
with one. `check_same_graph` computes nothing: it compares the graphs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfusion.compiler.capture import CapturedGraph, capture_model
from fxfusion.compiler.pipeline import normalising_passes
from fxfusion.errors import SurgeryError
from fxfusion.graph import ops
from fxfusion.graph.editor import erase_dead_code
from fxfusion.graph.pass_base import History
from fxfusion.graph.pass_manager import run_passes
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.cache_slots import new_cache
from fxfusion.models.traced import TracedGraph, evaluating, model_inputs

TOKENS, PREFILL = 7, 4
_FIRST_IDS = 256  # multimodal models keep the ids with a meaning of their own at the end
_SAME = 4  # times the dtype's epsilon: the same operations in the same order, so mostly no difference at all
_NOISE = 32  # times it: experts see the tokens in another grouping
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
_SKIPPED = "so nothing can be said about its cache (check=False skips this)"
_BROKEN = 0.1  # a cache that is off by this much does not work at all
_CACHED = 8  # times what the unchanged model's own cache is off


def proof_tokens(model: nn.Module) -> Tensor:
    """A few random token ids, `[2, TOKENS]`, always the same, on the model's device."""
    config: Any = model.config
    decoder = config.get_text_config(decoder=True)
    count = min(int(getattr(decoder, "vocab_size", _FIRST_IDS)), _FIRST_IDS)
    special = {value for name, value in vars(decoder).items() if name.endswith("token_id") and isinstance(value, int)}
    usable = torch.tensor([token for token in range(count) if token not in special] or list(range(count)))
    places = torch.randint(len(usable), (2, TOKENS), generator=torch.Generator().manual_seed(0))
    weight = next(model.parameters(), None)
    return usable[places].to(weight.device if weight is not None else "cpu")


@dataclass(frozen=True, slots=True)
class CacheProof:
    """`error`: what cached decoding of the unchanged model is off its own full computation; None without a cache."""

    ids: Tensor
    error: float | None

    @classmethod
    def of(cls, model: nn.Module, ids: Tensor, full: Tensor | None = None) -> CacheProof:
        """`full`: the model's logits, where they are known. Raises `SurgeryError` where decoding fails."""
        try:
            decoded = cached_logits(model, ids)
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(f"cached decoding of the unchanged model fails, {_SKIPPED}: {error}") from error
        if decoded is None:
            return cls(ids, None)
        return cls(ids, relative(decoded, full_logits(model, ids) if full is None else full))

    def refuse_broken(self) -> None:
        """Raises `SurgeryError` where the unchanged model's own cache is no use."""
        if self.error is not None and not self.error < _BROKEN:
            raise SurgeryError(
                f"cached decoding of the unchanged model is off by {self.error:.2g} from its own full computation, "
                f"{_SKIPPED}"
            )

    def check(self, model: nn.Module) -> None:
        """Raises `SurgeryError` unless the changed model, token by token, gives the logits of its full computation."""
        if self.error is None:
            return
        try:
            decoded = cached_logits(model, self.ids)
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(f"cached decoding fails: {error}") from error
        if decoded is None:
            raise SurgeryError("the changed model has no key-value cache any more")
        off = relative(decoded, full_logits(model, self.ids))
        limit = _CACHED * (self.error + torch.finfo(decoded.dtype).eps)
        if not off <= limit:
            raise SurgeryError(f"cached decoding is off by {off:.2g} (allowed {limit:.2g})")


@dataclass(slots=True, kw_only=True)
class Proof:
    """What the model without attention must compute. `expected`: logits `[2, TOKENS, vocabulary]`."""

    ids: Tensor
    expected: Tensor
    cache: CacheProof

    @classmethod
    def of_intact(cls, model: nn.Module, traced: TracedGraph, removed: Sequence[ResidualBlock], ids: Tensor) -> Proof:
        """Raises `SurgeryError` where the intact model is not causal, or its own cache does not work."""
        intact = full_logits(model, ids)
        _refuse_if_not_causal(model, ids, intact)
        expected = traced.run(ids, keep=[traced.logits], removed=removed)[traced.logits]
        cache = CacheProof.of(model, ids, intact)
        cache.refuse_broken()
        return cls(ids=ids, expected=expected, cache=cache)

    def check_logits(self, model: nn.Module) -> None:
        """Raises `SurgeryError` unless the model computes what the graph without the mixers does."""
        error = relative(full_logits(model, self.ids), self.expected)
        limit = _SAME * torch.finfo(self.expected.dtype).eps
        if not error <= limit:
            raise SurgeryError(f"the logits are off by {error:.2g} (allowed {limit:.2g})")


@torch.no_grad()
def full_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of all tokens at once, without a cache."""
    with evaluating(model):
        return _logits(model(**model_inputs(model, ids)), ids)


@torch.no_grad()
def cached_logits(model: nn.Module, ids: Tensor) -> Tensor | None:
    """Logits of a first part of the tokens at once and the others one by one, with a cache as `generate` makes it;
    None where the model has none.

    Raises `SurgeryError` where it keeps past tokens in another way.
    """
    config: Any = model.config
    if not hasattr(config.get_text_config(decoder=True), "use_cache"):
        return None
    taken = [name for name in _CACHE_ARGUMENTS if name in inspect.signature(model.forward).parameters]
    if not taken:
        raise SurgeryError(f"{type(model).__name__} keeps past tokens in another way than a key-value cache")
    cache = {taken[0]: new_cache(config)}
    logits = []
    with evaluating(model):
        for part in (ids[:, :PREFILL], *ids[:, PREFILL:].split(1, dim=1)):
            logits.append(_logits(model(input_ids=part, use_cache=True, **cache), part))
    return torch.cat(logits, dim=1)


def relative(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference around its mean over the vocabulary."""
    wanted = reference.double()
    scale = (wanted - wanted.mean(dim=-1, keepdim=True)).pow(2).mean().sqrt()
    return float((value.double() - wanted).pow(2).mean().sqrt() / scale)


def _refuse_if_not_causal(model: nn.Module, ids: Tensor, logits: Tensor) -> None:
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], ids[:, 1], ids[:, 0])
    change = relative(full_logits(model, other)[:, :-1], logits[:, :-1])
    if not change <= _NOISE * torch.finfo(logits.dtype).eps:
        raise SurgeryError("the model is not causal: its logits depend on later tokens")


def _logits(output: Any, ids: Tensor) -> Tensor:
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:-1] == ids.shape:
            return value.detach().clone()
    raise SurgeryError(f"the model returns no logits [batch, seq, vocabulary] for token ids {list(ids.shape)}")


def check_same_graph(model: nn.Module, intact: TracedGraph, removed: Sequence[ResidualBlock], ids: Tensor) -> None:
    """Raises `SurgeryError` unless the model computes what the intact graph without the removed blocks does.

    `intact`: captured for inputs that look like `ids` `[batch, seq]`. The changed model is captured anew and compared
    with it, operation by operation, weight by weight. Works on the meta device; says nothing about caches.
    """
    inputs = model_inputs(model, ids)
    with evaluating(model), torch.no_grad():
        found, notes = capture_model(model, (), inputs)
    if len(found) != 1:
        raise SurgeryError(f"the changed model is not one graph any more; {'; '.join(notes)}")
    changed = found[0].copy()
    _normalise(changed)
    expected = _without(intact.captured, removed)
    own = {id(value) for value in (*model.parameters(), *model.buffers())}
    numbers: dict[Any, int] = {}
    if _identity(expected, own, numbers) != _identity(changed, own, numbers):
        raise SurgeryError("the model computes something else than its graph without the dropped mixers")


def _without(captured: CapturedGraph, removed: Sequence[ResidualBlock]) -> CapturedGraph:
    copied = captured.copy()
    nodes = {node.name: node for node in copied.module.graph.nodes}
    for block in removed:
        nodes[block.after.name].replace_all_uses_with(nodes[block.before.name])
    erase_dead_code(copied.module.graph)
    _normalise(copied)  # what stood around a mixer may cancel now
    return copied


def _normalise(captured: CapturedGraph) -> None:
    run_passes(captured.module, normalising_passes(captured.weights), History())


def _identity(captured: CapturedGraph, own: Set[int], numbers: dict[Any, int]) -> str:
    """A text for what the graph returns: the same for the same operations on the same weights, in whatever order.

    `own`: ids of the model's parameters and buffers. `numbers` gives each distinct value one number, so that large
    graphs need no deep comparison.
    """
    known: dict[fx.Node, str] = {}
    for node in captured.module.graph.nodes:
        arguments = repr(fx.node.map_arg((node.args, dict(node.kwargs)), known.__getitem__))
        if node.op == "output":
            return arguments
        operation = ops.op_identity(node) if node.op.startswith("call_") else _source(node, captured.values, own)
        known[node] = f"%{numbers.setdefault((operation, arguments), len(numbers))}"
    raise AssertionError("a graph without output")


def _source(node: fx.Node, values: Mapping[str, Tensor], own: Set[int]) -> str:
    """What a placeholder or attribute holds: one of the model's own tensors, or something that looks like this."""
    held = id(values.get(node.name))
    return f"weight {held}" if held in own else f"value {ops.tensor_value(node)}"
