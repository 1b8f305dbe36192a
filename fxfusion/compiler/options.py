"""The options of `torch.compile(model, backend=ffn_fusion, options={...})`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fxfusion.errors import OptionError
from fxfusion.graph.torch_private import inductor_modes, inductor_option_names
from fxfusion.passes.choose_form import FormRequest
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import FusionPolicy, describe
from fxfusion.plan.record import refuse

Choice = FusionPolicy | FusionPlan
VerifyMode = Literal["off", "structure", "numeric", "paranoid"]

_MAY_BE_NONE = ("policy", "plan", "mode", "inductor")


def choose(policy: str | Mapping[str, object] | FusionPolicy | None, plan: Any) -> Choice:
    """The policy or the plan. Raises `OptionError` where both are given, or the plan removes layers."""
    if plan is not None and policy is not None:
        raise OptionError("policy and plan were both given; a plan names its groups itself, so give one of them")
    if plan is None:
        return FusionPolicy.resolve(policy)
    chosen = FusionPlan.resolve(plan)
    if chosen.removed:
        raise OptionError(
            f"plan: it removes layers {list(chosen.removed)}, and the compiler takes no layer out of a model: "
            "`fxfusion.fuse(model, plan)` does, and its result is compiled without a plan"
        )
    return chosen


class BackendOptions(BaseModel):
    """Checked options.

    `choice`: the policy or plan. `compiler`: what compiles the rewritten graph. `mode`: one of Inductor's modes;
    `inductor`: Inductor config keys. `verify`: `"structure"` checks the graph after each pass, `"numeric"` also
    compares the whole graph with its parallel form, `"paranoid"` does so again at the first `paranoid_calls` calls of
    each compiled graph, `"off"` does none of it. `form`: how a group's sum is computed; `"auto"` follows the rule of
    `passes/choose_form.py`, the others are `"concatenated"`, `"prepacked"` and `"members"`. `strict`: raise where
    fxfusion would otherwise fall back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    choice: Choice = Field(default_factory=FusionPolicy)
    compiler: Literal["inductor", "aot_eager", "eager"] = "inductor"
    mode: str | None = None
    inductor: dict[str, Any] = Field(default_factory=dict)
    verify: VerifyMode = "structure"
    form: FormRequest = "auto"
    strict: bool = False
    paranoid_calls: int = Field(default=3, ge=1)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """Options as `torch.compile` passes them. Raises `OptionError` that names the wrong one."""
        given = {key: value for key, value in (options or {}).items() if value is not None or key not in _MAY_BE_NONE}
        known = ("policy", "plan", *(name for name in cls.model_fields if name != "choice"))
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r}; options are: {', '.join(known)}")
        if mode is not None and given.setdefault("mode", mode) != mode:
            raise OptionError(f"mode was given twice: {mode!r} to torch.compile and {given['mode']!r} in options")
        try:
            return cls(choice=choose(given.pop("policy", None), given.pop("plan", None)), **given)
        except ValidationError as error:
            raise OptionError(describe(error, cls)) from None

    @field_validator("mode")
    @classmethod
    def _mode_of_inductor(cls, value: str | None) -> str | None:
        modes = inductor_modes()
        if value not in (None, "default", *modes):
            raise refuse(f"expected one of {', '.join(map(repr, modes))}, got {value!r}")
        return None if value == "default" else value

    @field_validator("inductor", mode="before")
    @classmethod
    def _keys_of_inductor(cls, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise refuse(f"expected a dict of Inductor config keys, got {type(value).__name__}")
        found = {str(key).replace("-", "_"): item for key, item in value.items()}
        unknown = sorted(set(found) - inductor_option_names())
        if unknown:
            raise refuse(f"{unknown[0]!r} is no Inductor config key")
        if found.get("freezing"):
            raise refuse("freezing bakes weights into the graph, which would make them stale; leave it off")
        return found

    @model_validator(mode="after")
    def _options_of_others(self) -> BackendOptions:
        if "paranoid_calls" in self.model_fields_set and self.verify != "paranoid":
            raise refuse(f"only verify='paranoid' takes it, verify is {self.verify!r}", "paranoid_calls")
        for name in ("mode", "inductor"):
            if self.compiler != "inductor" and getattr(self, name):
                raise refuse(f"only compiler='inductor' takes it, compiler is {self.compiler!r}", name)
        return self
