"""The options of `torch.compile(model, backend=ffn_fusion, options={...})`, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from fxfusion.errors import OptionError
from fxfusion.passes.choose_form import FormRequest
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.policy import FusionPolicy

Compiler = Literal["inductor", "aot_eager", "eager"]
VerifyMode = Literal["off", "structure", "numeric", "paranoid"]

_COMPILERS = ("inductor", "aot_eager", "eager")
_VERIFY_MODES = ("off", "structure", "numeric", "paranoid")
_FORMS = ("auto", "concatenated", "prepacked", "members")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendOptions:
    """Checked options.

    `choice`: the policy or plan. `compiler`: what compiles the rewritten graph. `mode`: one of Inductor's modes;
    `inductor`: Inductor config keys. `verify`: `"structure"` checks the graph after each pass, `"numeric"` also
    compares the whole graph with its parallel form, `"paranoid"` does so again at the first `paranoid_calls` calls of
    each compiled graph, `"off"` does none of it. `form`: how a group's sum is computed; `"auto"` follows the rule of
    `passes/choose_form.py`, the others are `"concatenated"`, `"prepacked"` and `"members"`. `strict`: raise where
    fxfusion would otherwise fall back.
    """

    choice: FusionPolicy | FusionPlan = field(default_factory=FusionPolicy)
    compiler: Compiler = "inductor"
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    verify: VerifyMode = "structure"
    form: FormRequest = "auto"
    strict: bool = False
    paranoid_calls: int = 3

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None) -> BackendOptions:
        """Options as `torch.compile` passes them. Raises `OptionError` that names the wrong one."""
        given = dict(options or {})
        known = ("policy", "plan", *(f.name for f in fields(cls) if f.name != "choice"))
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(f"unknown option {unknown[0]!r}; options are: {', '.join(known)}")
        if mode is not None and given.get("mode") not in (None, mode):
            raise OptionError(f"mode was given twice: {mode!r} to torch.compile and {given['mode']!r} in options")
        if given.get("policy") is not None and given.get("plan") is not None:
            raise OptionError("policy and plan were both given; a plan names its groups itself, so give one of them")
        plan, policy = given.get("plan"), given.get("policy")
        choice = FusionPlan.resolve(plan) if plan is not None else FusionPolicy.resolve(policy)
        parsed = cls(
            choice=choice,
            compiler=cast(Compiler, _one_of("compiler", given.get("compiler", "inductor"), _COMPILERS)),
            mode=_mode(given.get("mode", mode)),
            inductor=_inductor(given.get("inductor")),
            verify=cast(VerifyMode, _one_of("verify", given.get("verify", "structure"), _VERIFY_MODES)),
            form=cast(FormRequest, _one_of("form", given.get("form", "auto"), _FORMS)),
            strict=_boolean("strict", given.get("strict", False)),
            paranoid_calls=_count("paranoid_calls", given.get("paranoid_calls", 3)),
        )
        if "paranoid_calls" in given and parsed.verify != "paranoid":
            raise OptionError(f"paranoid_calls: only verify='paranoid' takes it, verify is {parsed.verify!r}")
        if parsed.compiler != "inductor" and (parsed.mode or parsed.inductor):
            wrong = "mode" if parsed.mode else "inductor"
            raise OptionError(f"{wrong}: only compiler='inductor' takes it, compiler is {parsed.compiler!r}")
        return parsed


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise OptionError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return str(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name}: expected True or False, got {value!r}")
    return value


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"{name}: expected a whole number from 1, got {value!r}")
    return value


def _mode(value: Any) -> str | None:
    from fxfusion.graph.torch_private import inductor_modes

    if value is None or value == "default":
        return None
    return _one_of("mode", value, inductor_modes())


def _inductor(value: Any) -> dict[str, Any]:
    from fxfusion.graph.torch_private import inductor_option_names

    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise OptionError(f"inductor: expected a dict of Inductor config keys, got {type(value).__name__}")
    found = {str(key).replace("-", "_"): item for key, item in value.items()}
    unknown = sorted(set(found) - inductor_option_names())
    if unknown:
        raise OptionError(f"inductor: {unknown[0]!r} is no Inductor config key")
    if found.get("freezing"):
        raise OptionError("inductor: freezing bakes weights into the graph, which would make them stale; leave it off")
    return found
