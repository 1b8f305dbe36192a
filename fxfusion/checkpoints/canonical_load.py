"""Load a canonical folder: the model as transformers names it, with the plan applied while its tensors are read.

    config.json, plan -> names and shapes compared with the files -> attention out, FFNs fused, all on the meta device
    -> the tensors, streamed; those of dropped attention are never read

Without a plan it is the plain model. What transformers stores in another form than its modules have it (experts one by
one, other names or layouts) is read by the class's own `from_pretrained`, which alone knows how. That holds the whole
model, so a plan is applied after it; no code of the folder is run, no pickle is read, and nothing is left random.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.empty_model import (
    all_on_meta,
    check_buffers,
    config_of,
    empty_model,
    outline,
    own_tensors,
    real_empties,
    stored_names,
)
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder
from fxfusion.checkpoints.shards import byte_bar
from fxfusion.errors import CheckpointError, SurgeryError
from fxfusion.models.drop_record import write_refit
from fxfusion.models.ffn_surgery.fuse import fuse
from fxfusion.models.ffn_surgery.group_recipe import GroupRecipe
from fxfusion.models.ffn_surgery.record import FusedState, fused_state
from fxfusion.models.ffn_surgery.residue import residue_of
from fxfusion.models.ffn_surgery.widen import set_parameter
from fxfusion.plan.fusion_plan import FusionPlan

CONFIG, GENERATION_CONFIG, PLAN = "config.json", "generation_config.json", "fxfusion_plan.yaml"
_ADAPTER = "adapter_config.json"

log = logging.getLogger("fxfusion")


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
    plan = read_plan(reader.folder)
    if plan is not None and not fused:
        if plan.refit is not None and plan.groups:
            warnings.warn(f"{directory} was refitted for its fused form; without, it is another model", stacklevel=3)
        plan = plan.replace(groups=())
    built = dtype or main_dtype(reader)
    intact = outline(config, built)
    stored = _names(intact, reader)
    if stored is None:
        model, done = load_converted(reader, intact, copy.deepcopy(config), built), plan is None
    else:
        model = empty_model(copy.deepcopy(config), built)
        done = plan is None or fuse_on_meta(model, plan, shards)
        dtypes = {name: value.dtype for name, value in own_tensors(intact).items()} if dtype is not None else {}
        first = Filling(reader=reader, stored=stored, dtypes=dtypes, device=device if done else "cpu")
        with byte_bar(progress, "Reading", first.nbytes(model)) as advance:
            replace(first, advance=advance).run(model)
    if not done:
        fuse(model, plan, shards=shards)
    if plan is not None and plan.refit is not None:
        write_refit(model.config, plan.refit)
    model.config.dtype = built
    model.name_or_path = model.config._name_or_path = os.fspath(directory)
    if generation is not None:
        model.generation_config = generation
    return model.to(device).eval()


def _names(intact: Any, reader: CheckpointReader) -> dict[str, str] | None:
    """As of `stored_names`; None where transformers stores such a model in another form, and the folder has that."""
    try:
        found = stored_names(intact, reader)
    except CheckpointError:
        if not changes_stored(intact):
            raise
        return None
    changed = changed_own(intact)
    return None if changed is not None and changed[1] else found


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


def main_dtype(reader: CheckpointReader) -> torch.dtype:
    """The dtype of most of what is stored."""
    sizes: Counter[torch.dtype] = Counter()
    for facts in reader.stored.values():
        if facts.dtype.is_floating_point:
            sizes[facts.dtype] += facts.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


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


def fuse_on_meta(model: Any, plan: FusionPlan, shards: int) -> bool:
    """Apply a plan to a model without weights. False, and nothing done, where its code does not run on the meta
    device; such a model is fused when it has its weights."""
    try:
        with all_on_meta(model):
            fuse(model, plan, shards=shards)
    except SurgeryError as error:
        log.info("the plan is applied after the weights are read, since it cannot be before: %s", error)
        return False
    state = fused_state(model)
    if state is not None:
        gone = (*state.shells.values(), *state.parts.values())
        real_empties(part for shell in gone for part in shell.modules())
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Filling:
    """`stored`: names in the folder by names in the unfused model; `dtypes`: what to cast to, as stored where a name
    is not there; `device`: where the model goes; `advance`: told the bytes that were read."""

    reader: CheckpointReader
    stored: Mapping[str, str]
    dtypes: Mapping[str, torch.dtype]
    device: torch.device | str = "cpu"
    advance: Callable[[int], None] = lambda count: None

    def run(self, model: Any) -> None:
        """All tensors of a model: intact, without some attention, or fused on the meta device."""
        state = fused_state(model)
        for name, own in self._plain(model, state):
            set_parameter(model, name, self._read(own).to(self.device))
        if state is not None:
            self._fill_groups(model, state)
        model.tie_weights()

    def some(self, model: Any, names: Iterable[str]) -> None:
        """These tensors of an unfused model, and what is tied to them."""
        for name in names:
            set_parameter(model, name, self._read(name).to(self.device))
        model.tie_weights()

    def nbytes(self, model: Any) -> int:
        """Bytes that `run` reads."""
        state = fused_state(model)
        names = [own for _, own in self._plain(model, state)]
        if state is not None:
            names += [name for group in state.recipe.parts for name in group.reads]
        return sum(self.reader.stored[self.stored[name]].nbytes for name in names)

    def _plain(self, model: Any, state: FusedState | None) -> Iterator[tuple[str, str]]:
        """Names of what is not fused, with those in the unfused model."""
        if state is None:
            yield from ((name, name) for name in own_tensors(model))
            return
        written = {name for group in state.recipe.parts for name in group.writes}
        for name in own_tensors(model):
            own = state.recipe.unfused_name(name)
            if own not in written:
                yield name, own

    def _fill_groups(self, model: Any, state: FusedState) -> None:
        state.residue.clear()  # the meta device knew none of it
        for group in state.recipe.parts:
            members = _Members(self._read)
            state.residue.update(residue_of(group, members))
            done = _last_uses(group)
            for name, value in group.pack(members):
                set_parameter(model, state.recipe.fused_name(name) or name, value.to(self.device))
                members.forget(done.get(name, ()))

    def _read(self, name: str) -> Tensor:
        value = self.reader.read(self.stored[name])
        self.advance(value.nbytes)
        return value.to(self.dtypes.get(name, value.dtype))


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


def changes_stored(model: Any) -> bool:
    """Whether transformers stores some tensors of such a model in another form than the model has them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def changed_own(model: Any) -> tuple[str, bool] | None:
    """A tensor that transformers would take for another one if a folder had it by the model's own name, and whether it
    would change its values, too; None where there is none."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = get_model_conversion_mapping(model, add_legacy=False)
    converters = [one for one in known if isinstance(one, WeightConverter)]
    renamings: list[Any] = [one for one in known if not isinstance(one, WeightConverter)]
    for name in own_tensors(model) if known else ():
        renamed, pattern = rename_source_key(name, renamings, converters)
        if renamed != name or pattern is not None:
            return name, pattern is not None
    return None


def load_converted(reader: CheckpointReader, outline: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model of a folder, its tensors converted as its class does it, on the CPU.

    `outline`: the model on the meta device; `dtype`: of all floating-point tensors, but those that the class keeps in
    float32. Raises `CheckpointError` that names a tensor which is missing, left over or of another shape.
    """
    folder = reader.folder
    if folder.has(_ADAPTER):
        raise CheckpointError(f"{folder.path / _ADAPTER}: the folder holds adapters; load them with PEFT")
    _check_room(reader, outline)
    try:
        with _silent():
            model, found = type(outline).from_pretrained(
                folder.path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the library and its conversions make of bad files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{folder.path}: transformers cannot load its tensors: {reason}") from error
    for what, words in (("missing_keys", "lacks"), ("mismatched_keys", "has another shape for")):
        if found[what]:
            first = min(one if isinstance(one, str) else one[0] for one in found[what])
            raise CheckpointError(f"{folder.path} {words} the tensor {first}, by the conversions of transformers")
    if found["unexpected_keys"]:
        raise CheckpointError(f"{folder.path}: {min(found['unexpected_keys'])} is no tensor of the model")
    _say_casts(reader, model, dtype)
    return model


def _check_room(reader: CheckpointReader, outline: nn.Module) -> None:
    """Conversions move values and make none: a config that asks for more is wrong, before memory is taken for it."""
    check_buffers(outline)
    wanted = sum(value.numel() for value in own_tensors(outline).values())
    stored = sum(math.prod(facts.shape) for facts in reader.stored.values())
    if wanted > stored:
        raise CheckpointError(f"{reader.folder.path}: the config asks for {wanted} values, and the files have {stored}")


def _say_casts(reader: CheckpointReader, model: nn.Module, dtype: torch.dtype) -> None:
    """Say that values lost precision on the way: which tensors became which is the library's own affair."""
    wider = [facts for facts in reader.stored.values() if facts.dtype.is_floating_point]
    wider = [facts for facts in wider if facts.dtype.itemsize > dtype.itemsize]
    kept = {value.dtype for value in model.parameters()}
    if wider and not any(facts.dtype in kept for facts in wider):
        warnings.warn(f"{wider[0]} is read as {dtype}, as most of {reader.folder.path} is", stacklevel=4)


@contextmanager
def _silent() -> Iterator[None]:
    """Without bars and reports of transformers: what is wrong is an error here."""
    from transformers.utils import logging as transformers_logging

    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
