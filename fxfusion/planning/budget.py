"""What a plan may cost, what its groups may be, and what it was measured to cost. Nothing here loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxfusion.errors import OptionError
from fxfusion.plan.fusion_plan import FusionPlan

if TYPE_CHECKING:
    from fxfusion.analysis.quality import Quality


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan may cost; None: no limit.

    `drop`: attention layers to drop, a number or (a float below 1) a fraction of those there are.
    `max_perplexity_increase`: relative, 0.05 for 5 %. `max_kl`: nats per token to the intact model.
    `target_depth`: the FFN depth that remains. `max_latency` [ms]: as predicted for one decoded token.
    """

    drop: int | float | None = None
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    target_depth: int | None = None
    max_latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("drop", "max_perplexity_increase", "max_kl", "target_depth"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= 0):
                raise OptionError(f"{name}: expected a number from 0 on, got {value!r}")
        if isinstance(self.drop, float) and not self.drop <= 1:
            raise OptionError(
                f"drop: a fraction is at most 1.0, got {self.drop!r}; give a whole number of layers as int"
            )
        if self.max_latency is not None and not self.max_latency > 0:
            raise OptionError(f"max_latency: expected milliseconds above 0, got {self.max_latency!r}")
        if self.target_depth is not None and self.max_latency is not None:
            raise OptionError("target_depth and max_latency were both given; give one of them")

    @property
    def limits_quality(self) -> bool:
        return self.max_perplexity_increase is not None or self.max_kl is not None

    @property
    def most(self) -> float | None:
        """The price that a plan may have: FFNs, or milliseconds; None where the price is to be as low as can be."""
        return self.max_latency if self.target_depth is None else float(self.target_depth)

    def count(self, mixers: int) -> int | None:
        """How many of so many attentions to drop."""
        if self.drop is None:
            return None
        number = round(self.drop * mixers) if isinstance(self.drop, float) else self.drop
        if number > mixers:
            raise OptionError(f"drop: {number} attention layers are to go, the model has {mixers}")
        return number

    def allows(self, quality: Quality) -> bool:
        assert quality.loss_increase is not None and quality.kl is not None
        if self.max_kl is not None and not float(quality.kl) <= self.max_kl:
            return False
        bound = self.max_perplexity_increase
        return bound is None or float(quality.loss_increase.exp()) - 1 <= bound

    @property
    def allowed_loss(self) -> float:
        """The increase of the loss that is allowed, in nats per token. A KL is of about that size too."""
        bounds = [self.max_kl] if self.max_kl is not None else []
        if self.max_perplexity_increase is not None:
            bounds.append(math.log1p(self.max_perplexity_increase))
        return min(bounds, default=math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a group of two or more FFNs may be; None: anything. A single FFN stays as it is, whatever its size.

    `max_members` [FFNs], `max_width` [intermediate channels, summed], `max_bytes` [summed], `max_dependency`: the
    largest entry of the matrix between two members.
    """

    max_members: int | None = None
    max_width: int | None = None
    max_bytes: int | None = None
    max_dependency: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_members", "max_width", "max_bytes", "max_dependency"):
            value = getattr(self, name)
            if value is not None and not value >= 0:  # NaN is caught too
                raise OptionError(f"{name}: expected a number from 0 on, got {value!r}")

    def allow(self, members: int, width: int, size: int, dependency: float = 0.0) -> bool:
        """Whether a group of so many FFNs may be, with the sums of their widths and bytes."""
        bounds = (self.max_members, self.max_width, self.max_bytes, self.max_dependency)
        values = (members, width, size, dependency)
        return all(bound is None or value <= bound for value, bound in zip(values, bounds, strict=True))


@dataclass(frozen=True, slots=True)
class Measured:
    """A plan, the FFN depth that it leaves, the memory of its wide weights, and what it costs (where a
    refit follows: after it)."""

    plan: FusionPlan
    depth: int
    fused_bytes: int
    quality: Quality

    @property
    def cost(self) -> float:
        """What is minimised: the increase of the loss over the intact model's, in nats per token."""
        assert self.quality.loss_increase is not None
        return float(self.quality.loss_increase)

    def __str__(self) -> str:
        return f"{self.plan}\nFFN depth {self.depth}\n{self.quality}"

    @property
    def upper(self) -> float:
        """The upper end of the cost's interval."""
        assert self.quality.loss_increase is not None
        return float(self.quality.loss_increase.high)
