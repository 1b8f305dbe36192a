"""What a plan records besides its groups: for which model, from which scores, made by what. Nothing of it is fused.

Also the checks that the plan itself shares: layers, members, and errors that say where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from reprlib import Repr
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Member = int | str

_DIGITS = 6  # significant digits of a measured number: more would be noise, and hide the number from a reader

short: Callable[[object], str] = Repr().repr


def refuse(why: str, *at: int | str) -> PydanticCustomError:
    """A validation error for a part of the value at hand; `at` is the way from the value to the part."""
    return PydanticCustomError("plan", "{why}", {"why": why, "at": at})


def refuse_repeated(layers: Sequence[int], what: str) -> None:
    """Raises where a layer is in the list a second time, at that place."""
    seen: set[int] = set()
    for index, layer in enumerate(layers):
        if layer in seen:
            raise refuse(f"layer {layer} is {what} twice", index)
        seen.add(layer)


def _layer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refuse(f"a layer is a whole number, got {short(value)}")
    if value < 0:
        raise refuse(f"layer {value} is negative")
    return int(value)


def _member(value: Any) -> Member:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise refuse(f"a member is a layer number or the module path of an FFN, got {short(value)}")
    return _layer(value)


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


CheckedLayer = Annotated[int, Field(ge=0), BeforeValidator(_layer)]
CheckedMember = Annotated[Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)], BeforeValidator(_member)]
_Count = Annotated[int, Field(strict=True, ge=1)]
_Number = Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(_rounded)]


class Record(BaseModel):
    """Frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(Record):
    """What tells a model from others; all but `tensors` stays when attention is dropped and FFNs are fused.

    Made by `fxfusion.models.fingerprint.facts_of`. What is None is not compared.
    """

    architecture: str = Field(description="class name of the model")
    layers: _Count = Field(description="number of decoder layers")
    hidden: _Count | None = Field(default=None, description="width of the residual stream")
    vocabulary: _Count | None = Field(default=None, description="number of token embeddings")
    fingerprint: str | None = Field(default=None, description="hash over the parameters outside the decoder layers")
    weights: str | None = Field(default=None, description="hash over some of their values; a difference only warns")
    tensors: str | None = Field(
        default=None, description="hash over all names, shapes and dtypes, and one over every byte; see `weights`"
    )


class LayerScore(Record):
    """One measured number; `error` is its standard error. Six significant digits are kept."""

    layer: CheckedLayer
    value: _Number
    error: _Number | None = None


class Scores(Record):
    """What each layer's attention is worth, by one method (`"cosine"`, `"loss"`, `"kl"`, ...)."""

    method: str
    values: tuple[LayerScore, ...]

    @field_validator("values")
    @classmethod
    def _each_layer_once(cls, values: tuple[LayerScore, ...]) -> tuple[LayerScore, ...]:
        refuse_repeated([score.layer for score in values], "scored")
        return values


class ResidueFile(Record):
    """What a folder of fused weights keeps so that its members can be given back: a file beside the plan."""

    file: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class LayerFit(Record):
    """One linear layer that a refit looked at. Errors are on held-out text: the distance of the residual stream from
    the reference's after the layer's block, as a part of the size of the latter."""

    name: str = Field(description="module path of the layer in the fused model")
    layers: tuple[CheckedLayer, ...] = Field(description="layers whose FFNs (or attention) it serves")
    penalty: _Number | None = Field(
        default=None, description="ridge penalty, as a part of the Gram matrix's mean diagonal"
    )
    before: _Number
    after: _Number
    applied: Annotated[bool, Field(strict=True)] = Field(description="false where nothing was better than before")
    side: Literal["out", "in"] = Field(
        default="out", description="out: its result goes into the stream; in: it reads the (normed) stream"
    )

    def __str__(self) -> str:
        fitted = "rounded" if self.penalty is None else f"at penalty {self.penalty:g}"
        words = fitted if self.applied else "left as it was"
        return f"{self.name} ({self.side}): error {self.before:.3g} -> {self.after:.3g}, {words}"


class Refit(Record):
    """That the fused model was refitted in closed form, towards what, and on what. Losses are in nats per token, on the
    held-out part of the text; `fingerprint` is a digest over all of the text."""

    reference: Literal["unfused", "intact"] = Field(description="the model that it was refitted to")
    later: Literal["none", "ffn", "all"] = Field(description="which layers after the groups: none, FFNs, attention too")
    sides: Literal["out", "both"] = Field(default="out", description="which ends of the blocks: see `LayerFit.side`")
    grid: str | None = Field(default=None, description="of weights that were rounded to one: int4:GROUP or int8:GROUP")
    tokens: _Count = Field(description="calibration tokens")
    held_out_tokens: _Count = Field(description="tokens that decided on penalties, and whether a layer was changed")
    fingerprint: str = Field(description="digest over the text")
    loss_before: _Number
    loss_after: _Number
    fits: tuple[LayerFit, ...] = ()

    def __str__(self) -> str:
        changed, grid = sum(fit.applied for fit in self.fits), f", grid: {self.grid}" if self.grid else ""
        return (
            f"refitted to the {self.reference} model on {self.tokens:,} tokens: {changed} of {len(self.fits)} layers "
            f"changed (later: {self.later}, sides: {self.sides}{grid}); loss on {self.held_out_tokens:,} other tokens "
            f"{self.loss_before:.4g} -> {self.loss_after:.4g}"
        )


class MeasuredQuality(Record):
    """What the plan was measured to cost on its text. `loss_increase` and `kl` against the intact model, in nats per
    token; `top1`: the part of tokens where its most likely token is the intact model's.
    """

    perplexity: _Number
    loss_increase: _Number | None = None
    kl: _Number | None = None
    top1: _Number | None = None
    tokens: _Count

    def __str__(self) -> str:
        increase = "" if self.loss_increase is None else f", {self.loss_increase:+.4g} nats per token above intact"
        return f"measured on {self.tokens:,} tokens: perplexity {self.perplexity:.4g}{increase}"


class Versions(Record):
    """Versions of what made a plan."""

    fxfusion: str | None = None
    torch: str | None = None
    transformers: str | None = None
    python: str | None = None


class MadeBy(Record):
    """What made a plan, and when: `date` is UTC in ISO 8601."""

    command: str | None = None
    date: str | None = None
    seed: Annotated[int, Field(strict=True)] | None = None
    versions: Versions | None = None

    @classmethod
    def now(cls, command: str | None = None, seed: int | None = None) -> MadeBy:
        """The record of a plan that is being made: this time, and the versions that are installed."""
        import platform
        from datetime import datetime, timezone
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version()}
        for package in ("fxfusion", "torch", "transformers"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:  # then there is no version to record
                continue
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(command=command, date=date, seed=seed, versions=Versions(**found))
