"""The modules that stand where an attention and its norms were: they add nothing to the residual stream.

What an attention returns differs: a tensor or a tuple with weights and more beside it, the branch alone or the
stream with the branch already added. `watch` sees it on one forward pass; `NoAttention` returns the same with the
attention left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fxfusion.errors import SurgeryError

Kind = Literal["number", "zeros", "argument"]


@dataclass(frozen=True, slots=True)
class Returned:
    """What a module returned. `items`: None for a bare tensor, else how many values a `list` or tuple has;
    `place`: which of them is the hidden state; `alike`: arguments (position or keyword) of its shape and dtype."""

    items: int | None
    is_list: bool
    place: int
    alike: tuple[int | str, ...]
    first_alike: bool

    @property
    def is_norm_like(self) -> bool:
        """A bare tensor that looks like the first argument: what an identity can stand in for."""
        return self.items is None and self.first_alike


@dataclass(frozen=True, slots=True)
class Nothing:
    """What to return for "the attention added nothing".

    `number`: the integer 0, which leaves `x + 0` in the graph. `zeros`: a tensor of them, for code that does more
    with the result than add it. `argument`: the stream itself, from a module that adds it; `which` of the
    arguments that look like the result.
    """

    kind: Kind
    which: int = 0

    def __str__(self) -> str:
        return {"number": "0", "zeros": "zeros", "argument": f"argument {self.which}"}[self.kind]


class NoAttention(nn.Module):
    """Takes the place of an attention module that was dropped. Has no parameters.

    Plain attributes of the dropped module (numbers, strings, flags such as a layer's attention type or window) are
    kept, since model code around it may read them.
    """

    def __init__(self, dropped: nn.Module, returned: Returned, nothing: Nothing) -> None:
        super().__init__()
        for name, value in vars(dropped).items():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str, type(None))):
                setattr(self, name, value)
        self._returned, self._nothing = returned, nothing

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        returned = self._returned
        value = self._value(args, kwargs)
        if returned.items is None:
            return value
        values = [None] * returned.items
        values[returned.place] = value
        return values if returned.is_list else tuple(values)

    def _value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self._nothing.kind == "number":
            return 0
        key = self._returned.alike[self._nothing.which]
        found = args[key] if isinstance(key, int) else kwargs[key]
        return found if self._nothing.kind == "argument" else torch.zeros_like(found)

    def extra_repr(self) -> str:
        returned, value = self._returned, str(self._nothing)
        if self._nothing.kind == "argument":
            value = f"argument {returned.alike[self._nothing.which]}"
        if returned.items is None:
            return f"returns={value}"
        values = ["None"] * returned.items
        values[returned.place] = value
        return f"returns=({', '.join(values)})"


class NoNorm(nn.Identity):
    """Takes the place of a norm that served only the dropped attention. Has no parameters.

    Model code may ask the norm's weight for its dtype, so it keeps empty tensors by these names.
    """

    def __init__(self, dropped: nn.Module) -> None:
        super().__init__()
        self.training = dropped.training
        for name, value in dropped.named_parameters(recurse=False):
            self.register_buffer(name, torch.empty(0, dtype=value.dtype, device=value.device), persistent=False)

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        return input


def watch(model: nn.Module, paths: Iterable[str], run: Callable[[], object]) -> dict[str, Returned]:
    """What some modules return while `run` runs the model.

    Raises `SurgeryError` where one is not called, or returns something that no stub can return.
    """
    found: dict[str, Returned] = {}
    handles = []

    def hook_for(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[path] = _describe(path, args, kwargs, output)

        return hook

    wanted = list(paths)
    try:
        for path in wanted:
            handles.append(model.get_submodule(path).register_forward_hook(hook_for(path), with_kwargs=True))
        run()
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in wanted if path not in found]
    if missing:
        raise SurgeryError(f"{missing[0]} is not called as a module, so nothing can stand in for it")
    return found


def candidates(returned: Iterable[Returned]) -> list[Nothing]:
    """What to try, in order, for modules that return this; the best for the compiler comes first."""
    choices = min(len(one.alike) for one in returned)
    found = [Nothing("number")]
    if choices:
        found.append(Nothing("zeros"))
    return found + [Nothing("argument", which) for which in range(choices)]


def _describe(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Returned:
    if not isinstance(output, Tensor) and type(output) not in (tuple, list):
        raise SurgeryError(f"{path} returns a {type(output).__name__}, and only tensors, tuples and lists are known")
    items = [output] if isinstance(output, Tensor) else list(output)
    place = next((index for index, item in enumerate(items) if isinstance(item, Tensor)), None)
    if place is None:
        raise SurgeryError(f"{path} returns no tensor")
    result = items[place]
    given: dict[int | str, Any] = dict([*enumerate(args), *kwargs.items()])
    alike = tuple(key for key, value in given.items() if _looks_like(value, result))
    first = next(iter(given), None)
    return Returned(
        items=None if isinstance(output, Tensor) else len(items),
        is_list=isinstance(output, list),
        place=place,
        alike=alike,
        first_alike=bool(alike) and alike[0] == first,
    )


def _looks_like(value: Any, result: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == result.shape and value.dtype == result.dtype
