"""One removal of attention, step by step: look, renumber the cache, put stubs in, prove. Every step can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.compiler.capture import capture_model
from fxfusion.errors import CaptureError, SurgeryError
from fxfusion.models import cache_slots
from fxfusion.models.attention_sites import AttentionSite, find_sites, layer_list_path
from fxfusion.models.blocks import ResidualBlock
from fxfusion.models.cache_slots import CacheSlots, set_attribute
from fxfusion.models.drop_record import DropRecord, fused_entry, read_record
from fxfusion.models.no_attention import NoAttention, NoNorm, Nothing, Returned, candidates, watch
from fxfusion.models.surgery_proof import Proof, check_same_graph, full_logits, proof_tokens
from fxfusion.models.traced import TracedGraph, TracedModel, evaluating, model_inputs


@dataclass(slots=True, kw_only=True)
class AttentionSurgery:
    """What was found in the model, and what to do to it.

    `wanted`: layers that lose their attention; `survivors`: those that keep it. `sites`: of every layer that has a
    mixer now. `returned`: what each module that goes returns. `slots`: the cache slots afterwards, `old_slots` as of
    now. `layer_types`: of the intact model. `earlier`: what was dropped before.
    """

    model: Any
    ids: Tensor
    traced: TracedGraph
    wanted: list[int]
    survivors: list[int]
    sites: dict[int, AttentionSite]
    returned: dict[str, Returned]
    configs: list[Any]
    slots: CacheSlots
    old_slots: Sequence[int | None]
    layer_types: list[str] | None
    earlier: list[int]

    @classmethod
    def plan(cls, model: nn.Module, wanted: list[int], traced: TracedGraph | None = None) -> AttentionSurgery:
        """Find out everything without touching the model. `traced`: its graph for the tokens of the proof, if known.

        Raises `SurgeryError` where the model is no decoder that can be looked into, or lacks a wanted layer.
        """
        config = _decoder_config(model)
        if fused_entry(config) is not None:
            raise SurgeryError("FFNs of the model are fused, so its layers have other numbers: `unfuse` it first")
        record = read_record(config)
        ids = proof_tokens(model)
        try:
            traced = traced or TracedModel(model).graph(ids)
        except CaptureError as error:
            raise SurgeryError(f"{type(model).__name__} cannot be looked into: {error}") from error
        path = layer_list_path(traced)
        count = len(list(model.get_submodule(path).children()))
        present = sorted({block.layer for block in traced.blocks.mixers})
        _check_layers(wanted, count, path, present, record)
        sites = find_sites(traced, present) | find_sites(traced, wanted)
        configs = cache_slots.decoder_configs(model, path, count)
        if record is None:
            cache_slots.refuse_sharing(configs)
        survivors = [layer for layer in present if layer not in wanted]
        types = record.layer_types if record is not None else getattr(configs[0], "layer_types", None)
        fixed = any(cache_slots.is_computed(config, "layer_types") for config in configs)
        going = [name for layer in wanted for name in (*sites[layer].attention, *sites[layer].others)]
        return cls(
            model=model,
            ids=ids,
            traced=traced,
            wanted=wanted,
            survivors=survivors,
            sites=sites,
            returned=watch(model, going, lambda: run_once(model, ids)),
            configs=configs,
            slots=cache_slots.plan_slots(survivors, count, types, fixed),
            old_slots=record.cache_slots if record is not None else list(range(count)),
            layer_types=None if types is None else list(types),
            earlier=[] if record is None else record.dropped_attention,
        )

    @property
    def removed(self) -> tuple[ResidualBlock, ...]:
        """The mixers that go, as the graph of the intact model knows them."""
        return self.traced.blocks.mixers_of(self.wanted)

    def record(self) -> DropRecord:
        """What the config says afterwards."""
        return DropRecord(
            dropped_attention=sorted([*self.earlier, *self.wanted]),
            cache_slots=list(self.slots.slots),
            layer_types=self.layer_types,
        )

    def refuse_encoders(self) -> None:
        """For where nothing is run, which would show it: raises `SurgeryError` where an attention says that it sees
        later tokens."""
        for site in self.sites.values():
            if any(getattr(module, "is_causal", None) is False for module in self._modules(site)):
                raise SurgeryError(f"the model is not causal: {site.attention[0]} says so (is_causal)")

    def renumber_cache(self, undo: ExitStack, proof: Proof | None) -> None:
        """Give the survivors their cache slots, and the config what builds such caches.

        Raises `SurgeryError` where the slots cannot follow.
        """
        if not self.survivors:
            if proof is None:
                self._forget_cache(undo)
            return
        now = {layer: slot for layer, slot in enumerate(self.old_slots) if slot is not None}
        mixers = {layer: self._modules(site) for layer, site in self.sites.items()}
        names = cache_slots.index_attributes(mixers, now)
        if not names:
            caches = hasattr(self.configs[0], "use_cache") if proof is None else proof.cache.error is not None
            if caches:
                raise SurgeryError(
                    f"how the attention finds its slot of the key-value cache cannot be told: {self._facts()} has no "
                    "attribute that counts the layers"
                )
            return
        before = cache_slots.new_cache(self.configs[0])
        survivors = {layer: mixers[layer] for layer in self.survivors}
        cache_slots.set_slots(survivors, names, self.slots, undo)
        cache_slots.set_config(self.configs, self.slots, undo)
        cache_slots.check_slots(self.configs[0], before, self.old_slots, self.slots)

    def put_stubs(self, undo: ExitStack, proof: Proof | None) -> None:
        """Replace what goes by the first stand-in with which the model computes what it must.

        Raises `SurgeryError` where none does.
        """
        tried = []
        attention = [name for layer in self.wanted for name in self.sites[layer].attention]
        for nothing in candidates(self.returned[name] for name in attention):
            with ExitStack() as trial:
                self._replace(nothing, trial)
                try:
                    if proof is None:
                        check_same_graph(self.model, self.traced, self.removed, self.ids)
                    else:
                        proof.check_logits(self.model)
                except Exception as error:
                    first_line, *_ = f"{error}".split("\n")
                    tried.append(f"{nothing}: {type(error).__name__}: {first_line}")
                    continue
                undo.callback(trial.pop_all().close)
                return
        raise SurgeryError(f"nothing can stand in for {self._facts()}; tried {'; '.join(tried)}")

    def prove_cache(self, undo: ExitStack, proof: Proof | None) -> None:
        """Check cached decoding. A model without any attention that needs its cache to count tokens is set to
        work without one."""
        if proof is None:
            return
        try:
            proof.cache.check(self.model)
        except Exception as error:
            if self.survivors:
                raise SurgeryError(f"{error}; found {self._facts()}, cache slots {self.slots.slots}") from error
            self._forget_cache(undo)

    def _forget_cache(self, undo: ExitStack) -> None:
        """No cache by default; one that is made from the config all the same says that it is empty."""
        owners = [self.model.config, *self.configs, getattr(self.model, "generation_config", None)]
        for owner in owners:
            if hasattr(owner, "use_cache"):
                set_attribute(owner, "use_cache", False, undo)
        cache_slots.set_config(self.configs, self.slots, undo)

    def _replace(self, nothing: Nothing, undo: ExitStack) -> None:
        for layer in self.wanted:
            site = self.sites[layer]
            for name in site.attention:
                module = self.model.get_submodule(name)
                self._set(name, NoAttention(module, self.returned[name], nothing), undo)
            for name in site.others:
                # What is no norm (a projection, say) stays and is computed for nobody.
                if self.returned[name].is_norm_like:
                    self._set(name, NoNorm(self.model.get_submodule(name)), undo)

    def _set(self, name: str, module: nn.Module, undo: ExitStack) -> None:
        undo.callback(self.model.set_submodule, name, self.model.get_submodule(name))
        self.model.set_submodule(name, module)

    def _modules(self, site: AttentionSite) -> list[nn.Module]:
        return [module for name in site.attention for module in self.model.get_submodule(name).modules()]

    def _facts(self) -> str:
        """The first layer that goes, for messages."""
        site = self.sites[self.wanted[0]]
        kinds = {name: type(self.model.get_submodule(name)).__name__ for name in site.attention}
        named = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        return f"{named}{', with ' + ', '.join(site.others) if site.others else ''}"


def _decoder_config(model: object) -> Any:
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not isinstance(config, PreTrainedConfig):
        raise SurgeryError(f"{type(model).__name__} is no transformers model: it has no config to follow")
    if config.is_encoder_decoder:
        raise SurgeryError(f"{type(model).__name__} is an encoder-decoder model; only decoders can lose attention")
    return config


def run_once(model: nn.Module, ids: Tensor) -> None:
    """Let the modules be called. On the meta device by capturing: model code that looks at values would fail there."""
    if not ids.is_meta:
        full_logits(model, ids)
        return
    with evaluating(model), torch.no_grad():
        capture_model(model, (), model_inputs(model, ids))


def _check_layers(wanted: list[int], count: int, path: str, present: list[int], record: DropRecord | None) -> None:
    if wanted[-1] >= count:
        raise SurgeryError(f"there is no layer {wanted[-1]}: {path} has {count}, counted from 0")
    dropped = set(record.dropped_attention if record is not None else ())
    if stale := sorted(dropped & set(present)):
        raise SurgeryError(
            f"config.fxfusion says that layer {stale[0]} lost its attention, but the model has one there: it was built "
            "from the config of another model that lost it"
        )
    for layer in wanted:
        if layer in dropped:
            raise SurgeryError(f"layer {layer} has lost its attention already")
