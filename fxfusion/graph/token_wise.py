"""Does a region of a graph treat each token by itself?

The region is run once on fake tensors and the ATen operations that arrive are judged: ATen tags say
which are pointwise and which reduce, so a new spelling of a norm or an activation needs no entry
here. Values are tracked as `[tokens..., channels]` or, after a reduction without keepdim, `[tokens...]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxfusion.errors import RefusalCode, Refused
from fxfusion.graph import ops
from fxfusion.graph.torch_private import FakeTensorMode, OpOverload, TorchDispatchMode, size_hint

_COPIES = frozenset("_to_copy clone alias contiguous lift_fresh".split())
_RESHAPES = frozenset("view _unsafe_view reshape _reshape_alias expand unsqueeze squeeze".split())
# Linear layers: which argument holds the tokens. Not where a constant stands on the left.
_LINEARS = {"mm": 0, "addmm": 1, "linear": 0}
_LAST_AXIS_NORMS = frozenset("native_layer_norm _fused_rms_norm rms_norm".split())
_LAST_AXIS_REDUCTIONS = frozenset("_softmax _log_softmax softmax log_softmax".split())
_CHANNEL_CUTS = frozenset("slice split split_with_sizes".split())
_METADATA = frozenset(("prim::device", "prim::layout"))
# Elementwise operations that ATen does not tag as pointwise.
_ELEMENTWISE = frozenset("masked_fill clamp hardswish log_sigmoid_forward _prelu_kernel".split())
_CREATIONS = frozenset(
    "ones zeros full ones_like zeros_like full_like scalar_tensor empty_like new_ones new_zeros".split()
)


def check_token_wise(nodes: Sequence[fx.Node], inputs: Mapping[fx.Node, bool], *, pointwise_only: bool = False) -> bool:
    """Raise `Refused` unless every node of the region treats each token by itself.

    `inputs` maps each value that the region reads to whether it is an activation (True) or a constant
    (False). With `pointwise_only`, each channel must be treated by itself too. Returns whether something is
    computed over all channels of a token (as a norm does).
    """
    # Inference mode would hand over whole operations (layer_norm) instead of their parts.
    with torch.inference_mode(False), FakeTensorMode() as mode:
        values: dict[fx.Node, Any] = {node: _fake_like(node, mode) for node in inputs}

        def value_of(found: fx.Node) -> Any:
            return values[found] if found in values else ops.plain_example(found)

        judge = _Judge(pointwise_only)
        judge.track(value for node, value in values.items() if inputs[node])
        for node in nodes:
            judge.node = node
            if node.op not in ("call_function", "call_method"):
                raise Refused(RefusalCode.UNKNOWN_OP, f"the module {node.target} could not be opened", node)
            try:
                with judge:
                    values[node] = ops.compute(node, value_of)
            except Refused:
                raise
            except Exception as error:
                # A function that does not run on fake tensors cannot be judged.
                message = f"{ops.op_name(node) or node} cannot be looked into: {type(error).__name__}"
                raise Refused(RefusalCode.UNKNOWN_OP, message, node) from error
        return judge.saw_all_channels


def _fake_like(node: fx.Node, mode: Any) -> Any:
    """A fake tensor of the node's shape with every symbolic size replaced by its hint."""
    example = ops.tensor_value(node)
    if example is None:
        return ops.plain_example(node)
    shape = [size_hint(size) for size in example.shape]
    with mode:
        return torch.empty(shape, dtype=example.dtype, device=example.device)


class _Judge(TorchDispatchMode):
    """Looks at each ATen operation on its way to the fake tensors."""

    def __init__(self, pointwise_only: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pointwise_only = pointwise_only
        self.node: fx.Node | None = None
        self.saw_all_channels = False
        # Tensors that hold activations -> whether their last axis is the channel axis. The tensors are
        # kept alive in the value, so that an id is never reused.
        self._activations: dict[int, tuple[torch.Tensor, bool]] = {}

    def track(self, tensors: Any, channels: bool = True) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._activations[id(tensor)] = (tensor, channels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        active = [value for value in _tensors((args, kwargs)) if id(value) in self._activations]
        if active:
            channels = self._judge(func, args, kwargs or {}, active, result)
            self.track(_tensors(result), channels)
        return result

    def _detaches_on_its_own(self) -> bool:
        """Whether `detach` is how torch computes the node (zeros_like, view(dtype)), not what the model wrote."""
        assert self.node is not None
        name = ops.op_identity(self.node)
        return name not in ("detach", "getattr") and "@" not in name

    def _refuse(self, code: RefusalCode, message: str) -> Refused:
        assert self.node is not None
        return Refused(code, message, self.node)

    def _judge(self, func: OpOverload, args: Any, kwargs: Any, active: list[torch.Tensor], result: Any) -> bool:
        """Whether the result still has a channel axis; raises if the operation is not token-wise."""
        name = func._schema.name.split("::")[-1].rstrip("_") or func._schema.name
        if func._schema.name in _METADATA:
            return True  # says where a tensor lives, not what it holds
        channels = self._activations[id(active[0])][1]
        if self.pointwise_only and name.startswith("new_") and result.dim() > 0:
            raise self._refuse(RefusalCode.NOT_POINTWISE, f"{name} makes a tensor of this member's own width")
        if name == "detach" and not self._detaches_on_its_own():
            raise self._refuse(RefusalCode.MODE_CHANGE, "detach stops the gradient")
        if name in _COPIES or name in _CREATIONS or name == "detach":
            return channels
        if name in _RESHAPES:
            return self._reshape(name, active[0], result, channels)
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            return self._pointwise(name, args, kwargs, active)
        if self.pointwise_only:
            raise self._refuse(
                RefusalCode.NOT_POINTWISE,
                f"{name} between the linear layers lets one intermediate channel see another",
            )
        if name in _LINEARS and len(active) == 1 and active[0] is args[_LINEARS[name]] and channels:
            self.saw_all_channels = True
            return True
        if name in _LAST_AXIS_NORMS and len(args[1]) == 1 and channels:
            self.saw_all_channels = True
            return True
        if name in _LAST_AXIS_REDUCTIONS or torch.Tag.reduction in func.tags or name == "linalg_vector_norm":
            return self._reduction(name, func, args, kwargs, active[0], channels)
        if name in _CHANNEL_CUTS and self._cuts_last_axis(name, args, kwargs, active[0]):
            return True
        raise self._refuse(RefusalCode.UNKNOWN_OP, f"{func} is not known to treat each token by itself")

    def _reshape(self, name: str, source: torch.Tensor, result: torch.Tensor, channels: bool) -> bool:
        if tuple(result.shape) == tuple(source.shape):
            return channels
        if name == "expand":
            if channels and source.shape[-1] == 1 and result.shape[:-1] == source.shape[:-1]:
                return True
            raise self._refuse(RefusalCode.BROADCAST, "expand repeats tokens or channels")
        if not channels:
            if name == "unsqueeze" and result.shape[:-1] == source.shape and result.shape[-1] == 1:
                return True
            raise self._refuse(RefusalCode.TOKEN_MIXING, f"{name} moves values between tokens")
        if name == "squeeze" and source.shape[-1] == 1 and result.shape == source.shape[:-1]:
            return False
        if result.dim() == 0 or result.shape[-1] != source.shape[-1]:
            raise self._refuse(
                RefusalCode.TOKEN_MIXING,
                f"{name} {list(source.shape)} -> {list(result.shape)} cuts or joins the channel axis",
            )
        return True

    def _pointwise(self, name: str, args: Any, kwargs: Any, active: list[torch.Tensor]) -> bool:
        shapes = {self._token_shape(value) for value in active}
        if len(shapes) > 1:
            raise self._refuse(RefusalCode.TOKEN_MIXING, f"{name} joins values of different token shapes")
        channels, _ = shapes.pop()
        if self.pointwise_only and len({value.shape[-1:] for value in active}) > 1:
            raise self._refuse(RefusalCode.NOT_POINTWISE, f"{name} joins values of different widths")
        for value in _tensors((args, kwargs)):
            if id(value) in self._activations:
                continue
            per_token = value.shape[:-1] if channels else value.shape
            if any(size != 1 for size in per_token) or value.dim() > active[0].dim():
                raise self._refuse(RefusalCode.OTHER_ACTIVATION, f"{name} reads a constant that differs by token")
        return channels

    def _token_shape(self, value: torch.Tensor) -> tuple[bool, tuple[int, ...]]:
        """Whether an activation has a channel axis, and the sizes of its token axes."""
        channels = self._activations[id(value)][1]
        return channels, tuple(value.shape[:-1] if channels else value.shape)

    def _reduction(
        self, name: str, func: OpOverload, args: Any, kwargs: Any, source: torch.Tensor, channels: bool
    ) -> bool:
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        dims = given.get("dim")
        listed = [dims] if isinstance(dims, int) else list(dims or [])
        if not channels or [dim % source.dim() for dim in listed] != [source.dim() - 1]:
            raise self._refuse(RefusalCode.TOKEN_MIXING, f"{name} over axes {listed} lets tokens see each other")
        self.saw_all_channels = True
        return name in _LAST_AXIS_REDUCTIONS or bool(given.get("keepdim", False))

    def _cuts_last_axis(self, name: str, args: Any, kwargs: Any, source: torch.Tensor) -> bool:
        position = 1 if name == "slice" else 2
        dim = args[position] if len(args) > position else kwargs.get("dim", 0)
        if dim % source.dim() != source.dim() - 1:
            raise self._refuse(RefusalCode.TOKEN_MIXING, f"{name} along axis {dim} cuts the token axes")
        return True


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
