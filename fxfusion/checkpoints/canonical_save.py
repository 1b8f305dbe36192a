"""Save a model under its original tensor names and shapes, with the plan beside it.

    config.json (as it was loaded), fxfusion_plan.yaml, model*.safetensors, generation_config.json, tokenizer, README.md

Plain transformers loads the folder as the unfused model; `fxfusion.from_pretrained` applies the plan. Attention
that was dropped has no weights left, and transformers asks for them: zeros stand in, with which it adds nothing to
the residual stream. That is proved before the folder takes its place: one dropped layer of each kind, with the zeros
and without the attention. Zeros do it for almost every attention; one that divides by the length of its queries gives
no numbers at all. A model of which only whole layers were removed is written as what it is: a plain, smaller one.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.canonical_load import CONFIG, PLAN
from fxfusion.checkpoints.companions import CardText, write_beside
from fxfusion.checkpoints.empty_model import changed_own, check_plain, empty_model, outline, own_tensors, tied_names
from fxfusion.checkpoints.folder import replacing, write_file
from fxfusion.checkpoints.listed_layers import table_of
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.checkpoints.shards import DEFAULT_SHARD_SIZE, TensorFacts, write_shards
from fxfusion.errors import CheckpointError, SurgeryError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_attention import drop_traced
from fxfusion.models.drop_record import NAME
from fxfusion.models.ffn_surgery.fuse import fuse, missing_drops
from fxfusion.models.ffn_surgery.record import FusedState, fused_state, intact_config, plan_of
from fxfusion.models.ffn_surgery.unfuse import unfused_tensors
from fxfusion.models.ffn_surgery.widen import set_parameter
from fxfusion.models.fingerprint import check_fits, decoder_layers, facts_of
from fxfusion.models.no_attention import NoAttention, NoNorm
from fxfusion.models.surgery_proof import full_logits, proof_tokens, relative
from fxfusion.plan.fusion_plan import FusionPlan

_SAME = 4  # times the dtype's epsilon


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    plan: FusionPlan | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: bool = False,
    card: CardText | None = None,
    overwrite: bool = False,
) -> None:
    """Arguments and errors as of `fxfusion.save_pretrained`; `card` makes the content of README.md."""
    bare: Any = bare_model(model)
    _check_plain(bare)
    missing = next((name for name, value in own_tensors(bare).items() if value.is_meta), None)
    if missing is not None:
        raise CheckpointError(f"{missing} is on the meta device: there is nothing to write")
    refuse_removed(plan or plan_of(bare))
    if plan is not None and plan.removed:
        fuse(bare, plan)
        plan = None
    with ExitStack() as undo, replacing(directory, overwrite=overwrite) as folder:
        if plan is not None:
            _drop(bare, plan, undo)
        tensors = CanonicalTensors.of(bare, plan)
        config = tensors.config
        write_file(folder / CONFIG, config.to_json_string())
        write_beside(folder, bare, tokenizer, card)
        if tensors.plan.groups or tensors.plan.dropped_attention:
            tensors.plan.save(folder / PLAN)
        write_shards(folder, tensors.facts, tensors.values(bare), max_shard_size, progress)
        if tensors.zeros:
            prove_zeros(CheckpointReader.open(folder), config, tensors.layers_without)
        if plan is not None:
            fuse(bare, plan)  # which proves it, before the folder takes its place
        undo.pop_all()


def refuse_removed(plan: FusionPlan) -> None:
    """Raises `CheckpointError` for a plan that removes layers and does something else besides."""
    if plan.removed and (plan.groups or plan.dropped_attention):
        raise CheckpointError(
            f"layers {list(plan.removed)} were removed, and others fused or left without attention: there is no "
            "canonical form of both. Save with format='nemotron-nas', or remove those layers alone, save and load the "
            "smaller model, and fuse that"
        )


def _state(model: Any) -> FusedState | None:
    """What is fused; None where only layers were removed, so that the model's tensors are its own."""
    state = fused_state(model)
    return state if state is not None and state.recipe.groups else None


def _own_config(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    if hasattr(config, NAME):
        delattr(config, NAME)
    return config


def _drop(model: Any, plan: FusionPlan, undo: ExitStack) -> None:
    """Drop what attention a plan drops; `undo` brings it back."""
    check_fits(plan, model)
    if fused_state(model) is not None:
        raise SurgeryError("the model is fused already: save it without `plan`")
    missing = missing_drops(model, plan)
    if missing:
        drop_traced(model, missing, check=True, whole=undo)


@dataclass(frozen=True, slots=True, kw_only=True)
class CanonicalTensors:
    """What will be written. `facts`: of every tensor of the intact model; `zeros`: names that this model lacks;
    `layers_without`: the layers that lost their attention, by number."""

    config: Any
    plan: FusionPlan
    facts: list[TensorFacts]
    zeros: frozenset[str]
    layers_without: dict[int, nn.Module]

    @classmethod
    def of(cls, model: Any, planned: FusionPlan | None = None) -> CanonicalTensors:
        """`planned`: groups to note of a model that is not fused. Works on the meta device too, for a dry run.

        Raises `CheckpointError` where the original format cannot hold the model, naming the tensor.
        """
        _check_plain(model)
        plan = plan_of(model)
        refuse_removed(plan)
        config = _own_config(model) if plan.removed else intact_config(model)
        config.architectures, config.dtype = [type(model).__name__], model.dtype
        intact = outline(config, model.dtype)
        if type(intact) is not type(model):
            raise CheckpointError(f"{type(model).__name__} is not what its config builds ({type(intact).__name__})")
        _check_ties(model, intact)
        _check_names(intact)
        dtypes = _dtypes(model)
        wanted = own_tensors(intact)
        unknown = dtypes.keys() - wanted.keys()
        if unknown:
            raise CheckpointError(f"{min(unknown)} is no tensor of the model that the config builds")
        zeros = frozenset(wanted.keys() - dtypes.keys())
        facts = [
            TensorFacts(name, tuple(wanted[name].shape), dtypes.get(name, wanted[name].dtype))
            for name in sorted(wanted, key=_order(model, zeros))
        ]
        if plan.removed:  # the numbers of the larger model say nothing of this one
            plan = FusionPlan()
        if planned is not None:
            plan = planned.replace(dropped_attention=plan.dropped_attention)
        path, _ = decoder_layers(intact)
        stray = [name for name in zeros if layer_number(name, path) not in plan.dropped_attention]
        if stray:
            raise CheckpointError(f"the model lacks {min(stray)}, and no attention that was dropped had it")
        if plan.model is None:
            plan = plan.replace(model=facts_of(intact))
        layers = _all_layers(model, path)
        return cls(
            config=config,
            plan=plan,
            facts=facts,
            zeros=zeros,
            layers_without={number: layers[number] for number in plan.dropped_attention},
        )

    def values(self, model: Any) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, made when it is asked for."""
        tied = tied_names(model)
        shapes = {one.name: one for one in self.facts}
        whole = _state(model) is None
        for name, value in model.state_dict(keep_vars=True).items() if whole else unfused_tensors(model):
            if name in tied:
                continue
            if name in shapes and tuple(value.shape) != shapes[name].shape:
                raise CheckpointError(
                    f"{name} is {list(value.shape)} in the model, and the config says {list(shapes[name].shape)}: the "
                    "original format cannot hold that"
                )
            yield name, value
        for name in (name for name in shapes if name in self.zeros):
            yield name, torch.zeros(shapes[name].shape, dtype=shapes[name].dtype)


def _check_plain(model: Any) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(f"{type(model).__name__} is no transformers model: a checkpoint needs its config")
    if model.config.model_type == "nemotron-nas":
        raise CheckpointError(
            "a model in the nemotron-nas layout has no canonical form: save it with format='nemotron-nas', or load it "
            "with fused=False first, where its folder keeps its members"
        )
    if table_of(model.config):
        raise CheckpointError(
            "a model whose layers differ as its folder lists them has no canonical form: save it with "
            "format='anymodel', or another than canonical"
        )
    check_plain(model)


def _check_names(intact: Any) -> None:
    """Raises or warns where transformers would read tensors in another way than they are written."""
    changed = changed_own(intact)
    if changed is None:
        return
    name, is_converted = changed
    if is_converted:
        raise CheckpointError(f"{name}: transformers stores it in another layout than the model has, by one name")
    warnings.warn(
        f"plain transformers will not load the folder, since it takes {name} for another tensor; "
        "fxfusion.from_pretrained does",
        stacklevel=5,
    )


def _check_ties(model: Any, intact: Any) -> None:
    """A tensor that the config ties to another is not written, so it has to be the same."""
    for target, source in tied_names(intact).items():
        one, other = model.get_parameter_or_buffer(target), model.get_parameter_or_buffer(source)
        if one is not other and not one.is_meta and not (one.shape == other.shape and one.equal(other)):
            raise CheckpointError(
                f"the config says that {target} is {source}, and they differ: set "
                "model.config.tie_word_embeddings = False"
            )


def _dtypes(model: Any) -> dict[str, torch.dtype]:
    """Of all tensors of the unfused model; members have that of the fused FFN."""
    state = _state(model)
    own = {name: value.dtype for name, value in own_tensors(model).items()}
    if state is None:
        return own
    recipe = state.recipe
    written = {name for group in recipe.parts for name in group.writes}
    found = {recipe.unfused_name(name): dtype for name, dtype in own.items()}
    found = {name: dtype for name, dtype in found.items() if name not in written}
    for group in recipe.parts:
        wide = own[recipe.fused_name(group.home.down.weight) or ""]
        found |= dict.fromkeys(group.reads, wide)
    return found


def _order(model: Any, zeros: Collection[str]) -> Callable[[str], int]:
    """The place of a tensor among what `values` gives: what is not fused, the groups' members, the zeros."""
    state = _state(model)
    groups = () if state is None else state.recipe.parts
    large = [[name for member in group.members for name in member.large] for group in groups]
    small = [[name for member in group.members for name in member.small] for group in groups]
    names = [name for one, other in zip(large, small, strict=True) for name in (*one, *other)]
    places = {name: place for place, name in enumerate((*names, *zeros), 1)}
    return lambda name: places.get(name, 0)


def _all_layers(model: Any, path: str) -> dict[int, nn.Module]:
    """The decoder layers by their number in the intact model, also those that fusing took out."""
    state = _state(model)
    children = list(model.get_submodule(path).children())
    if state is None:
        return dict(enumerate(children))
    return dict(zip(state.recipe.kept, children, strict=True)) | state.shells


def prove_zeros(reader: CheckpointReader, config: Any, without: Mapping[int, nn.Module]) -> None:
    """Run what was written, on a few tokens, with the attention of zeros and without it.

    `config`: of the intact model. `without`: the layers that lost their attention, by number, as the model that was
    saved has them. Needs the memory of a few layers. Raises `CheckpointError` where the logits differ.
    """
    model = empty_model(copy.deepcopy(config), config.dtype)
    path, layers = decoder_layers(model)
    kinds = {_kind(layers[number]): number for number in sorted(without, reverse=True)}
    chosen = sorted(kinds.values())
    names = [name for name in own_tensors(model) if layer_number(name, path) in (None, *chosen)]
    for name in names:
        set_parameter(model, name, reader.read(name))
    model.tie_weights()
    model.set_submodule(path, nn.ModuleList(layers[number] for number in chosen))
    ids = proof_tokens(model)
    with_zeros = full_logits(model, ids)
    for place, number in enumerate(chosen):
        for name, module in without[number].named_modules():
            if isinstance(module, (NoAttention, NoNorm)):
                model.set_submodule(f"{path}.{place}.{name}", copy.deepcopy(module).to(ids.device))
    expected = full_logits(model, ids)
    error = relative(with_zeros, expected)
    limit = _SAME * torch.finfo(expected.dtype).eps
    if not error <= limit:
        raise CheckpointError(
            f"the attention of layer {chosen[0]} adds something even if all its weights are zero (logits off by "
            f"{error:.2g}, allowed {limit:.2g}), so no folder that plain transformers loads can leave it out"
        )


def _kind(layer: nn.Module) -> tuple[object, ...]:
    """Layers of one kind have modules of the same classes with parameters of the same sizes."""
    classes = tuple((name, type(module)) for name, module in layer.named_modules())
    return classes, tuple((name, value.shape) for name, value in layer.named_parameters())


def layer_number(name: str, path: str) -> int | None:
    """The number of the decoder layer that a tensor is in; None for one outside."""
    first = name.removeprefix(f"{path}.").split(".")[0]
    return int(first) if name.startswith(f"{path}.") and first.isdigit() else None
