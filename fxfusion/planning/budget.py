"""What a plan may cost."""

from __future__ import annotations

from dataclasses import dataclass

from fxfusion.analysis.quality import Quality
from fxfusion.errors import OptionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a plan may cost; None: no limit.

    `drop`: attention layers to drop, a number or (a float below 1) a fraction of those there are.
    `max_perplexity_increase`: relative, 0.05 for 5 %. `max_kl`: nats per token to the intact model.
    `target_depth`: FFNs one behind the other that remain.
    """

    drop: int | float | None = None
    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    target_depth: int | None = None

    def __post_init__(self) -> None:
        for name in ("drop", "max_perplexity_increase", "max_kl", "target_depth"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not value >= 0):
                raise OptionError(f"{name}: expected a number from 0 on, got {value!r}")
        if isinstance(self.drop, float) and not self.drop <= 1:
            raise OptionError(
                f"drop: a fraction is at most 1.0, got {self.drop!r}; give a whole number of layers as int"
            )

    @property
    def limits_quality(self) -> bool:
        return self.max_perplexity_increase is not None or self.max_kl is not None

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
