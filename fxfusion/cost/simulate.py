"""What a model would do on a device, by arithmetic alone: `simulate("llama-3.3-70b", hardware="h100", tp=8)`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fxfusion.cost.hardware import Hardware
from fxfusion.cost.kernels import AllReduce, Launch, Phase, Workload
from fxfusion.cost.layer_table import LayerTable
from fxfusion.cost.memory import Bytes, step_bytes
from fxfusion.cost.read_table import read_table
from fxfusion.cost.sublayers import MovedWindow, Step, arrange
from fxfusion.cost.timing import Seconds, step_time
from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.report.plain import lines

_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """One step of a model: a token of each sequence (decode), or all their prompts (prefill).

    `seconds`: where the time goes. `bytes`: of one device. `kernels`, `all_reduces`: of one step on one device.
    `attentions`, `ffns`: one behind the other. `windows`: groups whose mixers moved. `price`: of one device for an
    hour. `quality`: as measured, where the plan carries it.
    """

    name: str
    hardware: Hardware
    work: Workload
    seconds: Seconds
    bytes: Bytes
    kernels: int
    all_reduces: int
    attentions: int
    ffns: int
    windows: tuple[MovedWindow, ...] = ()
    price: float | None = None
    quality: Mapping[str, Any] | None = None

    @property
    def latency_ms(self) -> float:
        """Time of one step: of one token of each sequence (decode), to the first token (prefill)."""
        return self.seconds.total * 1e3

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.work.tokens / self.seconds.total

    @property
    def tokens_per_second_per_user(self) -> float:
        """Of one sequence."""
        return self.tokens_per_second / self.work.batch

    @property
    def bytes_per_gpu(self) -> int:
        """Weights, cache and activations on one device."""
        return round(self.bytes.total)

    @property
    def fits_in_memory(self) -> bool:
        """Whether that is at most the usable part of the device's memory."""
        return self.bytes.total <= self.hardware.memory * self.hardware.usable_memory

    @property
    def cost_per_million_tokens(self) -> float | None:
        """In the currency of the price; None without one."""
        if self.price is None:
            return None
        return self.price * self.work.tp / _HOUR / self.tokens_per_second * 1e6

    def __str__(self) -> str:
        rows = [("latency [ms]", f"{self.latency_ms:.4g}"), ("tokens per second", f"{self.tokens_per_second:.4g}")]
        rows += [("GB on each device", f"{self.bytes_per_gpu / 1e9:.4g}{'' if self.fits_in_memory else ' (too much)'}")]
        rows += [("attentions, FFNs, one after another", f"{self.attentions}, {self.ffns}")]
        rows += [("kernels, all-reduces", f"{self.kernels}, {self.all_reduces}")]
        return lines(rows, f"predicted: one step of {self.name} on {self.work.tp} {self.hardware.name}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `fxfusion simulate --json` prints it."""
        found = {
            "model": self.name,
            "hardware": self.hardware.name,
            **asdict(self.work),
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_user": self.tokens_per_second_per_user,
            "latency_ms": self.latency_ms,
            "bytes_per_gpu": self.bytes_per_gpu,
            "memory": {name: round(value) for name, value in asdict(self.bytes).items()},
            "fits_in_memory": self.fits_in_memory,
            "all_reduces": self.all_reduces,
            "kernels": self.kernels,
            "attentions": self.attentions,
            "ffns": self.ffns,
            "windows": [self._window(window) for window in self.windows],
            "breakdown_ms": {name: value * 1e3 for name, value in asdict(self.seconds).items()},
            "price_per_hour": self.price,
            "cost_per_million_tokens": self.cost_per_million_tokens,
            "quality": None if self.quality is None else dict(self.quality),
        }
        return found

    def _window(self, window: MovedWindow) -> dict[str, Any]:
        """A window as plain data; one device alone has nobody to sum with."""
        shared = self.work.tp > 1
        return {
            "layers": list(window.layers),
            "mixers": window.mixers,
            "sublayers_before": window.before,
            "sublayers": window.after,
            "all_reduces_before": window.before if shared else 0,
            "all_reduces": window.after if shared else 0,
        }


def simulate(
    model: str | os.PathLike[str] | LayerTable,
    *,
    hardware: str | os.PathLike[str] | Hardware = "h100",
    tp: int = 1,
    precision: str = "bf16",
    batch: int = 1,
    context: int = 1024,
    phase: Phase = "decode",
    kv_precision: str | None = None,
    plan: FusionPlan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    groups: Iterable[Sequence[int | str]] = (),
    unfuse: Mapping[int, int] | None = None,
    price: float | None = None,
    launch: Launch = "cuda-graph",
    all_reduce: AllReduce = "plain",
) -> Simulation:
    """Predict one step of a model, which needs no weights.

    Args:
        model: a layer table, the name of one that comes with the package (`published_tables()`), or the path of a
            table, of a `config.json`, or of a folder with one.
        hardware: a `Hardware`, a name of `known_hardware()`, or a JSON or YAML file.
        tp: devices that share every matrix. precision: of the weights (fp4, fp8, int8, bf16, fp16, fp32).
        batch: sequences at once. context: tokens of each, in the cache (decode) or to be read (prefill).
        kv_precision: of the cache (default: that of the activations, 16 bits, 32 with fp32).
        plan, groups: attention that goes, FFNs that become one, by position in the table, padding slots included.
        unfuse: layers whose FFN is first split into so many equal ones, `{125: 8}`.
        price: of one device for an hour (default: the one of the hardware, if any).
        launch, all_reduce: what the model runs on, see `Workload`.

    Raises:
        OptionError: what cannot be read or cut so, or what the device cannot do; the message names it.
        PlanError: a plan file that is broken.
    """
    table = model if isinstance(model, LayerTable) else read_table(model)
    resolved = None if plan is None else FusionPlan.resolve(plan)
    step = arrange(table, resolved, groups, unfuse)
    given: dict[str, Any] = {"precision": precision, "batch": batch, "context": context, "phase": phase, "tp": tp}
    work = Workload(**given, kv_precision=kv_precision, launch=launch, all_reduce=all_reduce)
    measured = None if resolved is None else resolved.quality
    quality = None if measured is None else measured.model_dump(mode="json", exclude_none=True)
    return simulate_step(step, work, Hardware.of(hardware), price=price, quality=quality)


def simulate_step(
    step: Step,
    work: Workload,
    device: Hardware,
    *,
    price: float | None = None,
    quality: Mapping[str, Any] | None = None,
) -> Simulation:
    """The same for a step that is arranged already."""
    if price is not None and not 0 < price < float("inf"):
        raise OptionError(f"price: expected a price above 0, got {price!r}")
    timed = step_time(step, work, device)
    return Simulation(
        name=step.name,
        hardware=device,
        work=work,
        seconds=timed.seconds,
        bytes=step_bytes(step, work),
        kernels=timed.kernels,
        all_reduces=timed.all_reduces,
        attentions=len(step.attentions),
        ffns=len(step.ffns),
        windows=step.windows,
        price=device.price if price is None else price,
        quality=quality,
    )
