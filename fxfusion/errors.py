"""Errors and refusals: everything fxfusion can say no with.

An error stops the caller (a wrong option, a plan that cannot be read). A refusal is a value: one
candidate was not matched or not fused, and the report says why. No other module invents either.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


def first_line(error: BaseException) -> str:
    """The first line of a message, or the kind of the error where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class FxFusionError(Exception):
    """Base of every error that fxfusion raises on purpose."""


class OptionError(FxFusionError, ValueError):
    """A backend option, policy field or command-line value that does not exist or has a bad value."""


class PlanError(FxFusionError, ValueError):
    """A fusion plan that contradicts itself or does not fit the model."""


class CaptureError(FxFusionError, RuntimeError):
    """The model could not be turned into an FX graph."""


class SurgeryError(FxFusionError, ValueError):
    """A model's modules cannot be changed as asked. The model is as it was; the message says what was found in it."""


class CheckpointError(FxFusionError, ValueError):
    """A checkpoint folder that cannot be read or written; the message names the file or tensor. What was there before
    is as it was."""


class PassError(FxFusionError, RuntimeError):
    """A pass broke an invariant of the graph; the message names the pass and those that ran before it."""


class VerificationError(FxFusionError, RuntimeError):
    """The rewritten graph does not compute what its parallel form computes."""


class NotFusedError(FxFusionError, RuntimeError):
    """`strict=True` and a planned group was not fused; the message lists the refusals."""


class MissingWeightsError(FxFusionError, RuntimeError):
    """A fused model was run while its weights are still on the meta device."""


class GradientError(FxFusionError, RuntimeError):
    """A graph with packed weights, which have no gradient, was run where gradients are recorded."""


class RefusalCode(str, Enum):
    """Why a candidate was not matched or not fused. The value is what reports and tests show."""

    # The branch is not a feed-forward network that sees one token at a time.
    TOKEN_MIXING = "token_mixing"
    ROUTER = "router"
    UNKNOWN_OP = "unknown_op"
    OTHER_ACTIVATION = "other_activation"
    LINEAR_COUNT = "linear_count"
    NOT_POINTWISE = "not_pointwise"
    OUTPUT_NORM = "output_norm"
    STRUCTURE = "structure"
    HIGHER_ORDER = "higher_order"
    # The residual stream is not a plain sum.
    SCALED_STREAM = "scaled_stream"
    POST_NORM = "post_norm"
    BROADCAST = "broadcast"
    # Somebody else looks or writes.
    INNER_VALUE_READ = "inner_value_read"
    STREAM_READ = "stream_read"
    MUTATION = "mutation"
    # Semantics that a wide module could not keep.
    RANDOM = "random"
    MODE_CHANGE = "mode_change"
    SHARED_WEIGHT = "shared_weight"
    TENSOR_SUBCLASS = "tensor_subclass"
    NORM_UNPROVED = "norm_unproved"
    # Members of one chain that do not fit each other.
    DIFFERENT_OPS = "different_ops"
    DIFFERENT_LITERAL = "different_literal"
    DIFFERENT_DTYPE = "different_dtype"
    DIFFERENT_DEVICE = "different_device"
    # Fusable, but not chosen.
    ALONE = "alone"
    POLICY = "policy"
    NOT_PROFITABLE = "not_profitable"
    NOT_IN_PLAN = "not_in_plan"
    PLAN_UNMATCHED = "plan_unmatched"
    PLAN_ABSENT = "plan_absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """One candidate that was not fused.

    `node` is the graph node's name, `layer` the module path (may be empty), `source` the model's
    own source line as `file:line`, where the capture recorded one.
    """

    code: RefusalCode
    message: str
    node: str = ""
    layer: str = ""
    source: str = ""

    def to_dict(self) -> dict[str, str]:
        return {
            "code": self.code.value,
            "message": self.message,
            "node": self.node,
            "layer": self.layer,
            "source": self.source,
        }


class Refused(Exception):
    """Control flow of the matchers: stop looking at a candidate, for this reason.

    `node` is the graph node that decided it, or None; whoever catches this makes a `Refusal` of it.
    """

    def __init__(self, code: RefusalCode, message: str, node: object = None) -> None:
        super().__init__(message)
        self.code, self.message, self.node = code, message, node
