"""A word to who saves a changed model by transformers' own `save_pretrained`: what it writes loads as another model.

transformers builds the modules anew from the config: attention that was dropped comes back with random weights, and
layers have their old number and width. `fxfusion.save_pretrained` writes what loading needs.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import nn

_NAME = "save_pretrained"
ADVICE = "fxfusion.save_pretrained(model, folder) writes a folder that fxfusion.from_pretrained loads as it is"


class PlainSave:
    """Stands before a model's `save_pretrained`; a copy of the model has one of its own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        found = getattr(model.config, "fxfusion", None)
        changed = isinstance(found, dict) and (found.get("dropped_attention") or found.get("fused"))
        if changed and not _is_only_smaller(found):
            warnings.warn(
                "transformers alone will not load this folder as the model that is saved, since attention was dropped "
                f"or FFNs were fused: {ADVICE}",
                stacklevel=2,
            )
        with _as_plain(model.config) if _is_only_smaller(found) else nullcontext():
            return type(model).save_pretrained(model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlainSave:
        model: Any = self._model()
        return PlainSave(memo.get(id(model), model))  # a copy of the model is known before what it holds

    def __reduce__(self) -> tuple[Any, ...]:
        model: Any = self._model()
        return PlainSave, (model,)


def _is_only_smaller(found: Any) -> bool:
    """Whether whole layers were removed and nothing else was done: then the model is a plain one of fewer layers."""
    fused = found.get("fused") if isinstance(found, dict) else None
    return isinstance(fused, dict) and not fused["groups"] and not found.get("dropped_attention")


@contextmanager
def _as_plain(config: Any) -> Iterator[None]:
    """Inside, the config does not say what the model was made of: numbers of layers that the folder has not."""
    noted = config.fxfusion
    del config.fxfusion
    try:
        yield
    finally:
        config.fxfusion = noted


def warn_of_plain_save(model: nn.Module, undo: ExitStack | None = None) -> None:
    """From now on, `model.save_pretrained` says so first. `undo` takes that back."""
    if hasattr(type(model), _NAME) and _NAME not in vars(model):
        object.__setattr__(model, _NAME, PlainSave(model))
        if undo is not None:
            undo.callback(vars(model).pop, _NAME, None)
