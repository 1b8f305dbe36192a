"""What a device can do: datasheet numbers, the part of them that kernels reach, and what a kernel costs at least.

    Hardware.of("h100")          one of `known_hardware()`, or a JSON or YAML file of the same fields

Every constant has its source; those that were fitted to published latencies are named in `fitted`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxfusion.errors import OptionError, PlanError
from fxfusion.files import replacing
from fxfusion.plan import file as plan_file
from fxfusion.plan.policy import describe

KIND = "hardware file"
_FOLDER = resources.files("fxfusion.cost") / "devices"
_SUFFIXES = (".json", ".yaml", ".yml")

Precision = Literal["fp4", "fp8", "int8", "bf16", "fp16", "fp32"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class Link(BaseModel):
    """What joins the devices, and what an all-reduce over it costs.

    `bandwidth`: of one device in one direction, by datasheet [byte/s]. Of n bytes over p devices each sends and
    receives x = 2 (p - 1) / p * n bytes. A library takes the faster of two ways: one kernel that reads all others'
    memory, `small_latency + small_latency_per_peer * (p - 1) + x / small_bandwidth`, and a ring,
    `large_latency + x / large_bandwidth`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bandwidth: float = Field(gt=0)
    devices: int = Field(ge=2, description="devices that it joins")
    small_latency: float = Field(ge=0)
    small_latency_per_peer: float = Field(ge=0)
    small_bandwidth: float = Field(gt=0)
    large_latency: float = Field(ge=0)
    large_bandwidth: float = Field(gt=0)

    @model_validator(mode="after")
    def _is_possible(self) -> Link:
        for name in ("small_bandwidth", "large_bandwidth"):
            if getattr(self, name) > self.bandwidth:
                raise ValueError(f"{name} is above the link's bandwidth: {getattr(self, name):g} > {self.bandwidth:g}")
        return self

    def all_reduce_seconds(self, size: float, devices: int) -> float:
        """Time of one all-reduce of `size` bytes over so many devices."""
        return min(self._ways(size, devices))

    def is_one_kernel(self, size: float, devices: int) -> bool:
        """Whether that is one kernel, which other work can be merged into, and no ring."""
        small, large = self._ways(size, devices)
        return small <= large

    def _ways(self, size: float, devices: int) -> tuple[float, float]:
        moved = 2 * (devices - 1) / devices * size
        small = self.small_latency + self.small_latency_per_peer * (devices - 1) + moved / self.small_bandwidth
        return small, self.large_latency + moved / self.large_bandwidth


class Hardware(BaseModel):
    """One device. Bandwidths in byte/s, rates in FLOP/s (dense), latencies in seconds, memory in bytes.

    `bandwidth_fraction`, `compute_fraction`: the part of the datasheet's number that good kernels reach, 1 at most.
    `kernel_latency`: what each kernel costs beside its work, under a CUDA graph or whatever launches them at best.
    `eager_latency`: what the host needs to launch a kernel without a graph. `megakernel_latency`: what a GEMM or an
    attention waits for the one before it where all are one kernel. None: not known, and refused where it is needed.
    `gemm_floor`: the least time of a GEMM kernel, however few its bytes. `processors`: what works on tiles side by
    side (SMs). `tiled`: whether GEMMs are computed in whole tiles (tensor cores do, vector units do not).
    `usable_memory`: the part that weights and caches may take. `price`: of one hour of one device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    memory: float = Field(gt=0)
    memory_bandwidth: float = Field(gt=0)
    flops: Mapping[Precision, float] = Field(min_length=1)
    processors: int = Field(ge=1)
    bandwidth_fraction: float = Field(gt=0, le=1)
    compute_fraction: float = Field(gt=0, le=1)
    kernel_latency: float = Field(ge=0)
    gemm_floor: float = Field(ge=0)
    eager_latency: float | None = Field(default=None, gt=0)
    megakernel_latency: float | None = Field(default=None, gt=0)
    tiled: bool = True
    usable_memory: float = Field(default=0.9, gt=0, le=1)
    link: Link | None = None
    price: float | None = Field(default=None, gt=0)
    fitted: tuple[str, ...] = ()
    sources: Mapping[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_possible(self) -> Hardware:
        wrong = [name for name, rate in self.flops.items() if not rate > 0]
        if wrong:
            raise ValueError(f"flops.{wrong[0]}: expected a rate above 0")
        unknown = [name for name in (*self.fitted, *self.sources) if name.split(".")[0] not in Hardware.model_fields]
        if unknown:
            raise ValueError(f"fitted and sources name fields of this file; there is no {unknown[0]!r}")
        return self

    @property
    def bandwidth(self) -> float:
        """What good kernels reach [byte/s]."""
        return self.memory_bandwidth * self.bandwidth_fraction

    def rate(self, precision: str) -> float:
        """FLOP/s that good kernels reach. Raises `OptionError` where the device has no such arithmetic."""
        if precision not in self.flops:
            have = ", ".join(self.flops)
            raise OptionError(f"precision {precision!r}: {self.name} computes in {have}")
        return self.flops[precision] * self.compute_fraction  # type: ignore[index]

    @classmethod
    def of(cls, value: str | os.PathLike[str] | Hardware) -> Hardware:
        """A known device by name, one from a JSON or YAML file, or the device itself. Raises `OptionError`."""
        if isinstance(value, Hardware):
            return value
        name = os.fspath(value)
        if name.lower().endswith(_SUFFIXES):
            return cls.read(name)
        if name.lower() not in known_hardware():
            raise OptionError(
                f"hardware: no device {name!r}; there are: {', '.join(known_hardware())} (or a .json or .yaml file)"
            )
        return cls._checked(name, json.loads((_FOLDER / f"{name.lower()}.json").read_text("utf-8")))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Hardware:
        """A device from a JSON or YAML file. Raises `OptionError` that names the file and the field."""
        try:
            return cls._checked(os.fspath(path), plan_file.read(path).data)
        except PlanError as error:
            raise OptionError(f"hardware: {error}") from None

    @classmethod
    def _checked(cls, name: str, fields: Any) -> Hardware:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise OptionError(f"{name}: {describe(error, cls)}") from None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write it as JSON, for `read`. Raises `OptionError` where another file is there, unless with `overwrite`."""
        text = json.dumps(self.to_dict(), indent=1)
        with replacing(path, KIND, overwrite=overwrite) as beside:
            beside.write_text(text + "\n", "utf-8")
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in a file."""
        return self.model_dump(mode="json", exclude_none=True)


def known_hardware() -> tuple[str, ...]:
    """Names of the devices that come with the package."""
    names = (file.name for file in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))
