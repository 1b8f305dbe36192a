"""Write a model for transformers itself, fused, as `per_layer_config` and one short file of the family's own classes.

    config.json, modeling_fused.py, generation_config.json, tokenizer files, README.md, fxfusion_plan.yaml
    model*.safetensors                  tensors of the fused model; see `stack.py` for their names

`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it where fxfusion is not installed. The
settings are those of transformers' heterogeneous configs (`transformers.integrations.heterogeneity`, 5.19 and later);
when transformers builds such models by itself, `model_type` and `auto_map` go back to the family's, and the file goes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fxfusion.checkpoints.canonical_load import CONFIG, PLAN
from fxfusion.checkpoints.companions import CardText, write_beside
from fxfusion.checkpoints.empty_model import check_plain, own_tensors
from fxfusion.checkpoints.folder import replacing, write_file
from fxfusion.checkpoints.listed_layers import PREFIX, index_argument
from fxfusion.checkpoints.per_layer.proof import loaded_code, prove
from fxfusion.checkpoints.per_layer.settings import OWN, LayerSettings
from fxfusion.checkpoints.per_layer.stack import FURTHER, Stack
from fxfusion.checkpoints.quantised import check_layers, engines_of_quantised, linear_layers, quantise
from fxfusion.checkpoints.shards import DEFAULT_SHARD_SIZE, TensorFacts, write_shards
from fxfusion.cost.layer_forms import KNOWN
from fxfusion.errors import CheckpointError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.cache_slots import SHARING_NAMES, is_computed
from fxfusion.models.drop_record import NAME, fused_entry, read_record
from fxfusion.models.ffn_surgery.depth import FOLLOWS_SLOTS
from fxfusion.models.ffn_surgery.record import plan_of
from fxfusion.models.fingerprint import facts_of
from fxfusion.models.weight_grid import WeightGrid

CODE = "modeling_fused"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """What would be written. `config`: the content of config.json; `code`: of the modeling file; `tensors`: names,
    shapes and dtypes; `stack`: which layer of the model is where."""

    config: dict[str, Any]
    code: str
    tensors: list[TensorFacts]
    stack: Stack

    @classmethod
    def of(cls, model: nn.Module) -> ExportPlan:
        """Works on the meta device. Raises `CheckpointError` for what cannot be said so, by layer and tensor."""
        bare: Any = bare_model(model)
        check_model(bare)
        stack = Stack.of(bare)
        own = own_tensors(bare)
        kept = {name: value for name, value in own.items() if "None" not in stack.renamed(name).split(".")}
        facts = [TensorFacts.of(stack.renamed(name), value) for name, value in kept.items()]
        return cls(_config(bare, stack), modeling_file(stack, bare.config.model_type), facts, stack)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.tensors)

    def values(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the folder, out of the model's."""
        wanted = {one.name for one in self.tensors}
        for name, value in own_tensors(model).items():
            if self.stack.renamed(name) in wanted:
                yield self.stack.renamed(name), value


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: bool = False,
    card: CardText | None = None,
    overwrite: bool = False,
    grid: WeightGrid | None = None,
) -> ExportPlan:
    """Write a model so that transformers loads it as it is. All of it or nothing; the model stays as it is.

    What was written is loaded as transformers does, compared with the model module by module, and by its logits, with
    and without a cache, before the folder takes its place: this takes the memory of the model a second time.

    Arguments and errors as of `fxfusion.save_pretrained`; `card` makes the content of README.md, `grid` is what linear
    layers are rounded to.
    """
    bare: Any = bare_model(model)
    plan = ExportPlan.of(bare)
    if grid is not None:
        check_layers(bare, grid)
    refuse_meta(bare)
    engines = engines_that_load(plan.config)
    with replacing(directory, overwrite=overwrite) as folder:
        write_file(folder / f"{CODE}.py", plan.code)
        write_around(folder, bare, plan.config)
        write_beside(folder, bare, tokenizer, card, engines if grid is None else engines_of_quantised(engines))
        write_shards(folder, plan.tensors, plan.values(bare), max_shard_size, progress)
        name = plan.config["architectures"][0]
        prove(bare, plan.stack, folder, CODE, name)
        if grid is not None:
            names = {plan.stack.renamed(f"{layer}.weight") for layer in linear_layers(bare)}
            with loaded_code(folder / f"{CODE}.py") as module:
                quantise(folder, getattr(module, name), names, grid, max_shard_size, progress)
    return plan


def refuse_meta(model: Any) -> None:
    if any(value.is_meta for value in own_tensors(model).values()):
        raise CheckpointError("the model is on the meta device: there are no weights to write")


def write_around(folder: Path, model: Any, config: Mapping[str, Any]) -> None:
    """The config, and the plan by which the model was changed, where it was."""
    write_file(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    made = plan_of(model)
    if not made.changes_nothing:
        made.replace(model=made.model or facts_of(model)).save(folder / PLAN)


def is_ours(config: Mapping[str, Any]) -> bool:
    """Whether the content of a config.json is of this format."""
    return str(config.get("model_type", "")).startswith(PREFIX) and "per_layer_config" in config


def engines_that_load(config: Mapping[str, Any]) -> dict[str, str | None]:
    """For each engine None where it loads a folder with this configuration, else why not. vLLM puts norms of its own in
    place of the family's, whose gains are one vector."""
    gains = [
        f"not tested: layer {number} has {name} of {shape}, a gain for each head"
        for number, entry in config["per_layer_config"].items()
        for name, shape in entry.get(OWN, {}).items()
        if len(shape) > 1
    ]
    found = {"transformers": None, "vllm": gains[0] if gains else None}
    return engines_of_quantised(found) if config.get("quantization_config") else found


def modeling_file(stack: Stack, model_type: str) -> str:
    """The folder's code, for the classes of a family."""
    from jinja2 import Environment, StrictUndefined

    classes = stack.classes
    kinds = (classes.config, classes.causal, classes.base, classes.layer)
    imports: dict[str, list[str]] = {}
    for kind in kinds:
        names = imports.setdefault(kind.__module__, [])
        names += [kind.__name__] if kind.__name__ not in names else []
    index = index_argument(classes.layer)
    text = (resources.files(__package__) / f"{CODE}.py.j2").read_text("utf-8")
    # Python, of names of classes that were imported: nothing in it is escaped.
    template = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(text)  # noqa: S701
    return template.render(
        config=classes.config,
        causal=classes.causal,
        base=classes.base,
        layer=classes.layer,
        imports={module: sorted(names) for module, names in sorted(imports.items())},
        layers=stack.inner,
        index=f", {index}=layer_idx" if index else "",
        model_type=f"{PREFIX}{model_type}",
        **{f"{role}_name": _name(getattr(classes, role)) for role in ("config", "causal", "base")},
    )


def _name(kind: type[Any]) -> str:
    return f"Fused{kind.__name__}"


def check_model(model: Any) -> None:
    """Raises `CheckpointError` for what is no plain decoder of transformers with weights of one dtype."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise CheckpointError(f"{type(model).__name__} is no transformers model: a checkpoint needs its config")
    check_plain(model)
    if model.config.is_encoder_decoder or model.config.get_text_config(decoder=True) is not model.config:
        raise CheckpointError(f"the transformers format holds decoders of text; {type(model).__name__} is more")
    if getattr(model.config, "is_heterogeneous", None) is not False:
        raise CheckpointError(
            f"the config of {type(model).__name__} has a per_layer_config of its own"
            if hasattr(model.config, "is_heterogeneous")
            else "this transformers knows no per_layer_config: 5.19 or later does"
        )
    first, kind = next((name, value.dtype) for name, value in own_tensors(model).items() if value.is_floating_point())
    for name, value in own_tensors(model).items():
        if value.is_floating_point() and value.dtype != kind:
            raise CheckpointError(
                f"the transformers format has one dtype: {first} is {kind}, {name} is {value.dtype} (model.to(dtype) "
                "gives them one)"
            )


def _config(model: Any, stack: Stack) -> dict[str, Any]:
    """The content of config.json."""
    config = copy.deepcopy(model.config)
    _follow_layers(config, stack)
    for name in (NAME, KNOWN):
        vars(config).pop(name, None)
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    for name in SHARING_NAMES:  # each layer has attention, and its own keys and values
        data.pop(name, None)
    classes = stack.classes
    roles = {"AutoConfig": classes.config, "AutoModel": classes.base, "AutoModelForCausalLM": classes.causal}
    return data | {
        "allow_global_per_layer_attribute_access": True,
        "architectures": [_name(classes.causal)],
        "auto_map": {role: f"{CODE}.{_name(kind)}" for role, kind in roles.items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_type": f"{PREFIX}{model.config.model_type}",
        FURTHER: [],
        OWN: {},
        "per_layer_config": _per_layer(config, stack),
        "skip_returns": {path: list(returned) for path, returned in stack.returns.items()},
    }


def _per_layer(config: Any, stack: Stack) -> dict[str, dict[str, Any]]:
    settings = LayerSettings(stack.classes.layer, config)
    found: dict[str, dict[str, Any]] = {}
    for place, (layer, *behind) in enumerate(stack.layers):
        own = settings.of(layer, place)
        entry = {**own, **({"skip": sorted(layer.skip)} if layer.skip else {})}
        if behind:
            usual = {name: {} if name == OWN else getattr(config, name) for name in own}
            entry[FURTHER] = [{**usual, **settings.of(one, place), "skip": sorted(one.skip)} for one in behind]
        if entry:
            found[str(place)] = entry
    return found


def _follow_layers(config: Any, stack: Stack) -> None:
    """Let the config say the layers that are left, and of what type each is."""
    kept = [layer.number for layer, *_ in stack.layers]
    count = config.num_hidden_layers
    types = layer_types(config)
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name in FOLLOWS_SLOTS or is_computed(config, name):
            continue
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, name, type(value)(value[number] for number in kept))
    config.num_hidden_layers = len(kept)
    if types is not None and not is_computed(config, "layer_types"):
        config.layer_types = [types[number] for number in kept]


def layer_types(config: Any) -> list[str] | None:
    """Of the layers in memory, one after the other: while some have no attention, the config's own list is that of the
    cache's slots."""
    record, entry = read_record(config), fused_entry(config)
    if record is None or record.layer_types is None:
        types = getattr(config, "layer_types", None)
        return None if types is None else list(types)
    kept = range(len(record.layer_types)) if entry is None else entry["kept"]
    return [record.layer_types[number] for number in kept]
