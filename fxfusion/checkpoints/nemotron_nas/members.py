"""What a folder of fused weights keeps of its members, and the unfused model that this gives back.

    fxfusion_plan.yaml       what was fused; names the file beside it by its sha256
    fxfusion_residue.st      safetensors: gains and biases of all members; in its notes, the config from before

    config, plan -> the fused model without memory -> its tensors out of the layout, padding off -> `unfuse`

Engines read every `*.safetensors` of a folder (vLLM, where there is no index), hence the other ending.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.checkpoints.canonical_load import PLAN, handed_out, read_generation_config, read_plan
from fxfusion.checkpoints.empty_model import config_of, empty_model, fuse_on_meta, own_tensors
from fxfusion.checkpoints.folder import write_file
from fxfusion.checkpoints.nemotron_nas.configuration_decilm import DeciLMConfig
from fxfusion.checkpoints.nemotron_nas.layout import Layout, Piece
from fxfusion.checkpoints.nemotron_nas.load import MODEL_TYPE, config_from
from fxfusion.checkpoints.nemotron_nas.modeling_decilm import DeciLMForCausalLM
from fxfusion.checkpoints.nemotron_nas.proof import empty_decoder, finish, give_angles
from fxfusion.checkpoints.reading import CheckpointReader, SafeFolder, notes_in
from fxfusion.checkpoints.shards import TensorFacts
from fxfusion.errors import CheckpointError
from fxfusion.models.drop_record import write_refit
from fxfusion.models.ffn_surgery.recipe import FuseRecipe
from fxfusion.models.ffn_surgery.record import fused_state, intact_config, plan_of
from fxfusion.models.ffn_surgery.residue import Residue, extra_shapes
from fxfusion.models.ffn_surgery.unfuse import unfuse
from fxfusion.models.ffn_surgery.widen import set_parameter
from fxfusion.models.fingerprint import facts_of
from fxfusion.plan.fusion_plan import FusionPlan, ResidueFile
from fxfusion.report.progress import reporting

RESIDUE = "fxfusion_residue.st"
_CONFIG, _SHARDS, _FUSED = "config", "shards", "fused"
_CHUNK = 2**20  # bytes


def write_members(folder: Path, model: nn.Module) -> None:
    """Write plan and residue of a fused model into a folder; nothing where `fuse` did not make the model.

    A model read from a folder of fused weights may have been trained since: what that folder keeps of its members
    need not fit any more, so it is not copied, with a warning.
    """
    from safetensors.torch import save

    state = fused_state(model)
    if state is not None and state.recipe.gone:
        if state.recipe.groups:
            words = "the members of its fused FFNs are not kept, since layers were removed as a whole"
            warnings.warn(words, stacklevel=4)
        return
    if state is None:
        before = Path(getattr(model, "name_or_path", "") or ".") / RESIDUE
        if before.exists():
            warnings.warn(f"the members of its fused FFNs are not kept: only {before.parent} has them", stacklevel=4)
        return
    shards, plan = state.recipe.shards, plan_of(model)
    notes = {"format": "pt", _CONFIG: intact_config(model).to_json_string(), _SHARDS: str(shards), _FUSED: _fused(plan)}
    content = save({name: value.detach().cpu().contiguous() for name, value in state.residue.items()}, notes)
    write_file(folder / RESIDUE, content)
    named = ResidueFile(file=RESIDUE, sha256=hashlib.sha256(content).hexdigest())
    plan.replace(model=plan.model or facts_of(model), residue=named).save(folder / PLAN)


def _fused(plan: FusionPlan) -> str:
    """What of a plan says how weights were put together."""
    return json.dumps([[group.to_data() for group in plan.groups], list(plan.dropped_attention), plan.norm])


def load_unfused(
    directory: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Any:
    """The model from before its FFNs were fused, of its own class, without the attention that was dropped.

    Weights are those from before bit for bit with `norm="last"`, to rounding with `"fold"`. What a refit
    changed stays changed, with a warning. Arguments and errors as
    of `fxfusion.from_pretrained`.
    """
    reader = CheckpointReader.open(directory)
    kept = _Kept.read(reader.folder)
    model = kept.fused_outline(reader.main_dtype())
    layout = Layout.of(model)
    optional = ["lm_head.weight"] if layout.config.tie_word_embeddings else []
    reader.check((piece.facts for piece in layout.pieces), optional)
    size = sum(reader.stored[piece.facts.name].nbytes for piece in layout.pieces)
    with reporting(progress, "Reading", size, is_bytes=True) as step:
        for name, value in _own_tensors(layout, reader, step):
            set_parameter(model, name, value.to(device))
    model.tie_weights()
    state = fused_state(model)
    assert state is not None
    state.residue.clear()  # the meta device knew none of it
    state.residue.update(kept.residue(state.recipe))
    unfuse(model)
    if kept.plan.refit is not None:
        warnings.warn(f"{directory} was refitted for its fused form; without, it is another model", stacklevel=3)
        write_refit(model.config, kept.plan.refit)
    model.config.dtype = dtype or model.dtype
    return handed_out(model.to(device=device, dtype=dtype), directory, read_generation_config(reader.folder))


@dataclass(frozen=True, slots=True)
class _Kept:
    """The two files. `config`: of the model before; `shards`: see `fuse`."""

    folder: SafeFolder
    plan: FusionPlan
    file: str
    config: Any
    shards: int

    @classmethod
    def read(cls, folder: SafeFolder) -> _Kept:
        """Raises `CheckpointError` where the folder keeps no members, or not what it says."""
        plan = read_plan(folder)
        if plan is None or plan.residue is None:
            what = f"no {PLAN}" if plan is None else f"a {PLAN} that names no residue"
            raise CheckpointError(f"{folder.path} has the fused form alone, and keeps no members: it has {what}")
        file, where = plan.residue.file, folder.path / plan.residue.file
        if _sha256(folder.file(file)) != plan.residue.sha256:
            raise CheckpointError(f"{where} is cut off or was changed: {PLAN} names a file with another sha256")
        notes = notes_in(folder, file)
        try:
            config, shards = json.loads(notes[_CONFIG]), int(notes[_SHARDS])
        except (KeyError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{where} does not say which model was fused: {error}") from error
        if notes.get(_FUSED) != _fused(plan):  # weights are taken apart as they were put together
            raise CheckpointError(f"{folder.path / PLAN}: groups or norm are not those that {file} was written with")
        is_decilm = isinstance(config, dict) and config.get("model_type") == MODEL_TYPE
        read = config_from(config, folder, file) if is_decilm else config_of(config, where)
        return cls(folder, plan, file, read, shards)

    def fused_outline(self, dtype: torch.dtype) -> Any:
        """The fused model of its own class, its parameters on the meta device."""
        layers, stored = self.config.get_text_config(decoder=True).num_hidden_layers, len(self._reader().stored)
        if layers > 2**10 + stored:  # building modules takes time and memory
            raise CheckpointError(f"{self.folder.path / self.file} asks for {layers} layers")
        model = self._intact(dtype)
        if isinstance(model, DeciLMForCausalLM):
            give_angles(model, "cpu")
        if not fuse_on_meta(model, self.plan, self.shards):
            raise CheckpointError(
                f"{self.folder.path / PLAN} cannot be applied to the model that {self.file} describes"
            )
        return model

    def _intact(self, dtype: torch.dtype) -> Any:
        """The model before anything was done to it, its parameters on the meta device."""
        config = copy.deepcopy(self.config)  # what is done to a model is written into its config
        if isinstance(config, DeciLMConfig):
            decoder: Any = empty_decoder(config)
            return finish(decoder.to(dtype))
        return empty_model(config, dtype)

    def residue(self, recipe: FuseRecipe) -> Residue:
        """What the file has, each tensor compared with what the members must have before it is read."""
        reader = self._reader()
        before = {name: TensorFacts.of(name, value) for name, value in own_tensors(self._intact(torch.float32)).items()}
        small = {name: before[name] for group in recipe.groups for member in group.members for name in member.small}
        reader.check(small.values(), optional=reader.stored.keys())
        found = {name: reader.read(name) for name in small}
        wanted = dict(small)
        for group in recipe.groups:
            hidden = before[group.home.down.weight].shape[0]
            shapes = extra_shapes(group, found, hidden)
            wanted |= {name: TensorFacts(name, shape, torch.float32) for name, shape in shapes.items()}
        reader.check(wanted.values())
        return {name: found[name] if name in found else reader.read(name) for name in wanted}

    def _reader(self) -> CheckpointReader:
        return CheckpointReader.of_file(self.folder, self.file)


def _own_tensors(
    layout: Layout, reader: CheckpointReader, advance: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    """The model's own tensors out of those of the folder: parts put together, padding left out."""
    parts: dict[str, list[Piece]] = {}
    for piece in layout.pieces:
        if piece.source is None:
            _read(piece, (0,), reader, advance)
        else:
            parts.setdefault(piece.source.name, []).append(piece)
    for name, pieces in parts.items():
        rest = layout.state[name].shape[1:]
        values = []
        for piece in sorted(pieces, key=lambda one: one.source.begin if one.source else 0):
            assert piece.source is not None
            values.append(_read(piece, (piece.source.end - piece.source.begin, *rest), reader, advance))
        yield name, values[0] if len(values) == 1 else torch.cat(values)


def _read(piece: Piece, shape: tuple[int, ...], reader: CheckpointReader, advance: Callable[[int], None]) -> Tensor:
    """The part of a tensor that is the model's. Raises `CheckpointError` where the rest is not zero."""
    whole = reader.read(piece.facts.name)
    advance(whole.nbytes)
    own = tuple(slice(size) for size in shape)
    if tuple(whole.shape) == shape:
        return whole
    part = whole[own].clone()
    whole[own] = 0
    if bool(whole.any()):
        raise CheckpointError(f"{reader.folder.path}: {piece.facts.name} has values where its members have none")
    return part


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
