"""Load a canonical folder: the model as transformers reads it, with the plan applied while its tensors are read.

    config.json, plan -> names and shapes compared with the files -> attention out, FFNs fused, all on the meta device
    -> the tensors, streamed; those of dropped attention are never read

A model whose layers its config lists one by one is what its folder holds: no plan is applied to it. Without a plan it
is the plain model, by transformers. So is the model of a folder that has its tensors in another form
than its modules do: then the plan is applied after it, which takes the memory of the whole model.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxfusion.checkpoints.empty_model import changed_own, config_of, empty_model, fuse_on_meta, outline, own_tensors
from fxfusion.checkpoints.listed_layers import stored_names, table_of
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder, read_model
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.errors import CheckpointError
from fxfusion.models.drop_record import write_refit
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.record import FusedState, fused_state
from fxfusion.models.ffn_surgery.residue import residue_of
from fxfusion.models.ffn_surgery.widen import set_parameter
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.report.progress import reporting

CONFIG, GENERATION_CONFIG, PLAN = "config.json", "generation_config.json", "fxfusion_plan.yaml"


def load(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    fused: bool = True,
    shards: int = 1,
    progress: bool = False,
) -> Any:
    """The model of a canonical folder, in eval mode. Arguments and errors as of `fxfusion.from_pretrained`."""
    reader = CheckpointReader.open(directory)
    config = read_config(reader)
    generation = read_generation_config(reader.folder)
    if table_of(config):
        if not fused or shards != 1:
            raise CheckpointError(f"{directory} has its layers as they are: it keeps no members, and no shards")
        model = _load_as_it_is(reader, config, dtype, device, progress)
        return handed_out(model, directory, generation)
    plan = read_plan(reader.folder)
    if plan is not None and not fused:
        if plan.refit is not None and plan.groups:
            warnings.warn(f"{directory} was refitted for its fused form; without, it is another model", stacklevel=3)
        plan = plan.replace(groups=())
    built = dtype or reader.main_dtype()
    intact = outline(config, built)
    model = None
    if (plan is not None or torch.device(device).type != "cpu") and _is_canonical(reader, intact):
        model = empty_model(copy.deepcopy(config), built)
        if plan is None or fuse_on_meta(model, plan, shards):
            dtypes = {name: value.dtype for name, value in own_tensors(intact).items()} if dtype is not None else {}
            _fill(model, reader, dtypes, device, progress)
        else:
            model = None
    if model is None:
        model = read_model(reader, intact, copy.deepcopy(config), built, as_stored=dtype is None, progress=progress)
        if plan is not None:
            fuse(model, plan, shards=shards)
    if plan is not None and plan.refit is not None:
        write_refit(model.config, plan.refit)
    model.config.dtype = built
    return handed_out(model.to(device), directory, generation)


def handed_out(model: Any, directory: str | os.PathLike[str], generation: Any) -> Any:
    """A model that was read from a folder, in eval mode, with what its next save asks for. `generation`: as of
    `read_generation_config`."""
    model.name_or_path = model.config._name_or_path = os.fspath(directory)
    if generation is not None:
        model.generation_config = generation
    return model.eval()


def _is_canonical(reader: CheckpointReader, intact: Any) -> bool:
    """Whether the folder has the model's tensors by their own names and in their own form, and no others."""
    changed = changed_own(intact)
    try:
        reader.check(TensorFacts.of(name, value) for name, value in own_tensors(intact).items())
    except CheckpointError:  # transformers may know better; else it says what is wrong
        return False
    return changed is None or not changed[1]


def _load_as_it_is(
    reader: CheckpointReader, config: Any, dtype: torch.dtype | None, device: torch.device | str, progress: bool
) -> Any:
    """A model whose layers its config lists, as the folder has them; what was done to it is no more to be done."""
    built = dtype or reader.main_dtype()
    model = empty_model(config, built)
    changed = changed_own(model)
    if changed is not None and changed[1]:
        raise CheckpointError(f"{reader.folder.path}: {changed[0]} is stored in another form, which is not read here")
    own = own_tensors(model)
    names = stored_names(model, list(own))
    reader.check(TensorFacts.of(names[name], value) for name, value in own.items())
    dtypes = {names[name]: value.dtype for name, value in own.items()} if dtype is not None else {}
    _fill(model, reader, dtypes, device, progress)
    model.config.dtype = built
    return model.to(device)


def read_config(reader: CheckpointReader) -> Any:
    """The config of a folder, checked against the number of tensors: building modules takes time and memory."""
    where = reader.folder.path / CONFIG
    config = config_of(reader.folder.json(CONFIG), where)
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > len(reader.stored):
        raise CheckpointError(f"{where} asks for {layers} layers, and the files have {len(reader.stored)} tensors")
    return config


def read_plan(folder: SafeFolder) -> FusionPlan | None:
    """Raises `PlanError` that names file and line."""
    return FusionPlan.load(folder.file(PLAN)) if folder.has(PLAN) else None


def read_generation_config(folder: SafeFolder) -> Any:
    """Settings of `generate`, None where the folder has none. Raises `CheckpointError`."""
    from transformers import GenerationConfig

    if not folder.has(GENERATION_CONFIG):
        return None
    settings = folder.json(GENERATION_CONFIG)
    try:
        return GenerationConfig.from_dict(settings)
    except Exception as error:  # whatever the class makes of bad values
        raise CheckpointError(f"{folder.path / GENERATION_CONFIG} is not valid: {error}") from error


def _fill(
    model: Any,
    reader: CheckpointReader,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device | str,
    progress: bool,
) -> None:
    """Give a model without weights its tensors, one after the other, and fused ones group by group.

    plain      read -> cast -> in its place
    a group    read the members -> pack -> in the first member's place -> the members are let go

    `dtypes`: what to cast to, as stored where a name is not there; `device`: where the model goes.
    """
    state = fused_state(model)
    plain = stored_names(model, list(own_tensors(model))) if state is None else dict(_not_fused(model, state))
    groups = () if state is None else state.recipe.parts
    names = [*plain.values(), *(name for group in groups for name in group.reads)]
    with reporting(progress, "Reading", sum(reader.stored[name].nbytes for name in names), is_bytes=True) as advance:

        def read(name: str) -> Tensor:
            value = reader.read(name)
            advance(value.nbytes)
            return value.to(dtypes.get(name, value.dtype))

        for name, own in plain.items():
            set_parameter(model, name, read(own).to(device))
        if state is not None:
            _fill_groups(model, state, read, device)
    model.tie_weights()


def _not_fused(model: Any, state: FusedState) -> Iterator[tuple[str, str]]:
    """Names of what is not fused, with those in the unfused model."""
    written = {name for group in state.recipe.parts for name in group.writes}
    for name in own_tensors(model):
        own = state.recipe.unfused_name(name)
        if own not in written:
            yield name, own


def _fill_groups(model: Any, state: FusedState, read: Callable[[str], Tensor], device: torch.device | str) -> None:
    state.residue.clear()  # the meta device knew none of it
    for group in state.recipe.parts:
        members = _Members(read)
        state.residue.update(residue_of(group, members))
        done = _last_uses(group)
        for name, value in group.pack(members):
            set_parameter(model, state.recipe.fused_name(name) or name, value.to(device))
            members.forget(done.get(name, ()))


class _Members(Mapping[str, Tensor]):
    """Parameters of a group's members, each read when it is first asked for."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._reading, self._held = read, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._held:
            self._held[name] = self._reading(name)
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._held.pop(name, None)


def _last_uses(group: GroupRecipe) -> dict[str, list[str]]:
    """For a wide parameter: the members' matrices that nothing needs once it is made."""
    found = {}
    for number, matrix in enumerate(group.home.projections):
        last = matrix.own_bias if group.in_bias else matrix.weight
        found[last] = [member.projections[number].weight for member in group.members]
    return found
