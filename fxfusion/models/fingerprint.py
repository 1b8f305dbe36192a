"""What tells a model from others, and whether a plan was made for it.

The facts stay the same while layers lose their attention and FFNs become wider ones, so that a plan fits its model
before, between and after. Parameters inside the decoder layers come and go with that, and lists over layers in
the config follow them; what stays is the class, the number of layers, and all that stands outside the layers.
Only `tensors` changes with every bit of the model: results of measurements are filed under it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxfusion.errors import PlanError
from fxfusion.models.bare_model import bare_model
from fxfusion.models.drop_record import fused_entry
from fxfusion.plan.file import located
from fxfusion.plan.fusion_plan import FusionPlan, ModelFacts

_HEX_DIGITS = 16
_SAMPLES = 4096  # values of each parameter outside the layers that go into `weights`
_CHUNK = 2**24  # values hashed at a time
# Besides shapes: what else makes two configs of one class different models, whatever happens to the layers.
_CONFIG_FACTS = ("num_attention_heads", "head_dim")


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their module path, found by structure.

    The longest `nn.ModuleList` that is not inside an entry of another one (experts are); where a config says how
    many layers there are, a list of that length goes first. Raises `PlanError` where there is no list at all.
    """
    lists = list(_outer_lists(_decoder(model))) or list(_outer_lists(model))
    if not lists:
        raise PlanError(f"{type(model).__name__} has no decoder layers: no nn.ModuleList with modules in it")
    count = _config_value(model, "num_hidden_layers")
    # max takes the first of equals: a decoder's layers come before what reads them.
    layers = max(lists, key=lambda found: (len(found) == count, len(found)))
    path = next(name for name, module in model.named_modules() if module is layers)
    return path, layers


def facts_of(model: nn.Module, *, values: bool = True) -> ModelFacts:
    """What a plan records of its model, and what results of it are filed under.

    `values`: hash the weights too, every byte of them: about 1 s for each GB on one CPU core, and of a model elsewhere
    its way to the CPU. Without, and on the meta device, `weights` and `tensors` stay None.

    Raises `PlanError` where no decoder layers are found.
    """
    model = bare_model(model)
    path, layers = decoder_layers(model)
    outside = {name: value for name, value in model.named_parameters() if not _is_inside(name, path)}
    described: dict[str, Any] = {name: list(value.shape) for name, value in sorted(outside.items())}
    fused = fused_entry(getattr(model, "config", None))
    count = len(layers) if fused is None else int(fused["layers"])
    described["layers"] = [path, count]
    described |= {name: _config_value(model, name) for name in _CONFIG_FACTS}
    hidden, vocabulary = _sizes(model, path)
    return ModelFacts(
        architecture=type(model).__name__,
        layers=count,
        hidden=hidden,
        vocabulary=vocabulary,
        fingerprint=_digest(json.dumps(described, sort_keys=True).encode()),
        weights=_weights_digest(outside) if values else None,
        tensors=tensors_digest(model) if values else None,
    )


def check_fits(plan: FusionPlan, model: nn.Module) -> None:
    """Raises `PlanError` that says what differs, if the plan was made for another model or names a layer it lacks.

    Other weights in a model of the same build only warn: that a plan carries over is likely, and not certain.
    """
    found = facts_of(model, values=plan.model is not None)
    if plan.model is not None:
        _refuse_other_facts(plan.model, found)
    problem = plan.unknown_layer(found.layers)
    if problem is not None:
        raise PlanError(f"plan: {located(*problem)}")
    if plan.model is not None and _has_other_weights(plan.model, found, refitted=plan.refit is not None):
        message = "plan: model.weights differs: the plan was made with other weights of such a model; measure it anew"
        warnings.warn(message, stacklevel=2)


def _has_other_weights(wanted: ModelFacts, found: ModelFacts, *, refitted: bool) -> bool:
    """By what stands outside the layers; where all names, shapes and dtypes are the same, by every tensor. `refitted`:
    since the plan was made, which gave layers new weights, and nothing outside them."""
    if None not in (wanted.weights, found.weights) and wanted.weights != found.weights:
        return True
    if refitted or wanted.tensors is None or found.tensors is None:
        return False
    (before, _, one), (now, _, other) = wanted.tensors.partition(":"), found.tensors.partition(":")
    return before == now and one != other


def _refuse_other_facts(wanted: ModelFacts, found: ModelFacts) -> None:
    names = ("architecture", "layers", "hidden", "vocabulary", "fingerprint")
    pairs = [(name, getattr(wanted, name), getattr(found, name)) for name in names]
    wrong = [(name, one, other) for name, one, other in pairs if None not in (one, other) and one != other]
    if wrong:
        words = "; ".join(f"model.{name} is {one}, this model's is {other}" for name, one, other in wrong)
        only = [name for name, _, _ in wrong] == ["fingerprint"]
        hint = f" (parameters outside the layers, or {' or '.join(_CONFIG_FACTS)}, differ)" if only else ""
        raise PlanError(f"plan: made for another model: {words}{hint}")


def _decoder(model: nn.Module) -> nn.Module:
    """The part that holds the decoder: of a model of several towers, the one that it says writes text."""
    get_decoder = getattr(model, "get_decoder", None)
    found = get_decoder() if callable(get_decoder) else None
    return found if isinstance(found, nn.Module) else model


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList) and len(module):
        yield module
        return
    for child in module.children():
        yield from _outer_lists(child)


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(f"{path}.")


def _config_value(model: nn.Module, name: str) -> int | None:
    """A whole number of the model's config, that of its text part; None where there is no such number."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    config = get_text_config() if callable(get_text_config) else config
    value = getattr(config, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _sizes(model: nn.Module, layers_path: str) -> tuple[int | None, int | None]:
    """Hidden size and vocabulary: the config's, else the token embedding's (the largest outside the layers)."""
    tables = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not _is_inside(name, layers_path)
    ]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    hidden, vocabulary = _config_value(model, "hidden_size"), _config_value(model, "vocab_size")
    if largest is not None:
        hidden, vocabulary = hidden or largest.embedding_dim, vocabulary or largest.num_embeddings
    return hidden or _shared_size(model.get_submodule(layers_path)), vocabulary


def _shared_size(layers: nn.Module) -> int | None:
    """The one size that all weight matrices share (`[width, hidden]`, `[hidden, width]`, ...), else all weights."""
    for least in (2, 1):
        shapes = [set(value.shape) for value in layers.parameters() if least <= value.dim() <= 2]
        shared = set.intersection(*shapes) if shapes else set()
        if len(shared) == 1:
            return shared.pop()
    return None


def _weights_digest(parameters: Mapping[str, Tensor]) -> str | None:
    """Hash over evenly spaced values of each parameter; None without parameters or with one whose values are away.

    Values count as bfloat16, so that a checkpoint has one digest in whatever precision it is loaded.
    """
    if not parameters or any(value.is_meta or type(value) is not nn.Parameter for value in parameters.values()):
        return None
    digest = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        flat = value.detach().reshape(-1)
        step = flat.numel() // _SAMPLES | 1  # odd: a multiple of the row length would see one column
        sample = flat[::step].to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(name.encode())
        digest.update(bytes(sample.view(torch.uint8).tolist()))
    return digest.hexdigest()[:_HEX_DIGITS]


def tensors_digest(model: nn.Module) -> str | None:
    """`"<hash>:<hash>"`: over the class, and name, shape and dtype of every parameter and buffer; and over every byte
    of them, also of those that quantised weights are made of. None where some are on the meta device.
    """
    named = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])
    build = [type(model).__name__, *(f"{name} {list(value.shape)} {value.dtype}" for name, value in named)]
    digest = hashlib.sha256()
    for part in (part for _, value in named for part in _plain_parts(value.detach())):
        if part.is_meta:
            return None
        digest.update(f"{list(part.shape)} {part.dtype}".encode())
        _add_bytes(digest, part)
    return f"{_digest(json.dumps(build).encode())}:{digest.hexdigest()[:_HEX_DIGITS]}"


def _plain_parts(value: Tensor) -> Iterator[Tensor]:
    """The tensors that a subclass (a quantised weight, say) is made of; a plain tensor itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    names, _ = value.__tensor_flatten__()
    for name in names:
        yield from _plain_parts(getattr(value, name))


def _add_bytes(digest: Any, value: Tensor) -> None:
    """A piece at a time, so that a model elsewhere is never copied as a whole."""
    flat = (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).resolve_neg().reshape(-1)
    for piece in flat.split(_CHUNK) if flat.numel() else ():
        digest.update(piece.contiguous().cpu().view(torch.uint8).numpy())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_HEX_DIGITS]
