"""Which modules hold a decoder layer's attention, and which serve nothing else: read off the captured graph.

    x ─┬─ input norm ─ attention ─ output norm ─ add(x, ...) ─ y      without the mixer y is x, and all three
       └────────────────────────────────────────┘                     modules between have no node left

A module whose every node is dead once the mixer is out of the graph has no other purpose. Among those, the ones
that mix tokens are the attention; what remains are the norms before and after it. A norm that an FFN shares
(parallel blocks) stays alive, and so stays. No module is known by its name or class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fxfusion.errors import SurgeryError
from fxfusion.graph import provenance
from fxfusion.graph.dataflow import GraphFacts
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.traced import TracedGraph
from fxfusion.passes.match_residual import mixes_tokens


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One decoder layer's attention. `attention`: paths of the modules that mix tokens (two where a layer adds up two
    mixers); `others`: paths of the modules that serve only them, norms as a rule."""

    layer: int
    attention: tuple[str, ...]
    others: tuple[str, ...]


def layer_list_path(traced: TracedGraph) -> str:
    """Module path of the list of decoder layers: `model.layers`.

    Raises `SurgeryError` where the blocks do not lie in one list.
    """
    blocks = (*traced.blocks.mixers, *traced.blocks.ffns)
    paths = [(block.name.split("."), str(block.layer)) for block in blocks]
    for depth in range(min(len(steps) for steps, _ in paths)):
        prefixes = {tuple(steps[:depth]) for steps, _ in paths}
        if len(prefixes) == 1 and all(steps[depth] == number for steps, number in paths):
            return ".".join(prefixes.pop())
    raise SurgeryError(f"the decoder layers are in no single list of modules: {', '.join(_names(blocks)[:4])}")


def find_sites(traced: TracedGraph, layers: Iterable[int]) -> dict[int, AttentionSite]:
    """The attention of some layers, as it would be if all of them lost it together.

    Raises `SurgeryError` where a layer has no mixer or several, where the attention is no module of its own, or
    where other layers read what it computes.
    """
    wanted = sorted(set(layers))
    prefix = layer_list_path(traced)
    blocks = _one_block_each(traced, wanted)
    before = traced.needed([traced.logits])
    # The addition that brings the result in goes too; some attention modules hold it.
    dead = before - traced.needed([traced.logits], blocks.values()) | {block.after for block in blocks.values()}
    graph = traced.captured.module.graph
    facts = GraphFacts(graph, traced.captured.weights)
    inside = {f"{prefix}.{layer}": layer for layer in wanted}
    owned: dict[int, dict[str, list[fx.Node]]] = {layer: {} for layer in wanted}
    for node in graph.nodes:
        paths = provenance.enclosing_modules(node) if node in before else []
        for layer in {inside[path] for path in paths if path in inside}:
            for path in dict.fromkeys(paths):
                if path.startswith(f"{prefix}.{layer}."):
                    owned[layer].setdefault(path, []).append(node)
    return {layer: _site(blocks[layer], owned[layer], dead, facts) for layer in wanted}


def _one_block_each(traced: TracedGraph, layers: Iterable[int]) -> dict[int, ResidualBlock]:
    found: dict[int, ResidualBlock] = {}
    for layer in layers:
        blocks = traced.blocks.mixers_of([layer])
        if not blocks:
            raise SurgeryError(f"layer {layer} has no attention (or any other mixer of tokens) to drop")
        if len(blocks) > 1:
            raise SurgeryError(
                f"layer {layer} mixes tokens in {len(blocks)} residual blocks ({', '.join(_names(blocks))}); "
                "which of them is its attention cannot be told"
            )
        found[layer] = blocks[0]
    return found


def _site(
    block: ResidualBlock, owned: Mapping[str, list[fx.Node]], dead: set[fx.Node], facts: GraphFacts
) -> AttentionSite:
    gone = [path for path, nodes in owned.items() if dead.issuperset(nodes)]
    outermost = [path for path in gone if not any(path.startswith(f"{other}.") for other in gone)]
    attention = [path for path in outermost if any(mixes_tokens(node, facts) for node in owned[path])]
    if not attention:
        raise SurgeryError(_why_none(block, owned, dead, facts))
    others = tuple(path for path in outermost if path not in attention)
    return AttentionSite(layer=block.layer, attention=tuple(attention), others=others)


def _why_none(block: ResidualBlock, owned: Mapping[str, list[fx.Node]], dead: set[fx.Node], facts: GraphFacts) -> str:
    """What stands in the way: values that others read, or an attention that is spread over the layer itself."""
    mixing = [path for path, nodes in owned.items() if any(mixes_tokens(node, facts) for node in nodes)]
    holder = next((path for path in mixing if not dead.isdisjoint(owned[path])), "")
    if not holder:
        return f"the attention of layer {block.layer} is no module of its own: {block.name} computes it itself"
    alive = next(node for node in owned[holder] if node not in dead)
    where = provenance.source_line(alive)
    return (
        f"the attention of layer {block.layer} ({holder}) computes something that other parts of the model read "
        f"({alive}{f', {where}' if where else ''}), so it cannot be dropped alone"
    )


def _names(blocks: Iterable[ResidualBlock]) -> list[str]:
    return [block.name or f"layer {block.layer}" for block in blocks]
