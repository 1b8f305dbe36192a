"""What a node does beside returning a value, and whose memory its result may share. Every pass asks here.

Default-deny: what is not understood writes all that it reads, may do anything else, and returns what may share memory
with all that it read. Understood are

    ATen and prims operations, as torch.add, `x.add`, torch.ops.aten.add or add.Tensor     by their schema
    functions that torch writes in Python, sizes, numbers, indexing                        by the lists below

An operation is pure when it writes nothing, draws no random number, switches no mode and acts on nothing else. Lists
can only grant; each entry has a test that runs it (tests/fxfusion/graph/test_effects.py).
Source: DESIGN, section 9; pytorch#94851, #100105, #136662.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import fx

from fxfusion.graph import ops
from fxfusion.graph.torch_private import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    dispatcher_operations,
    is_export_guard,
)

KEPT = "fxfusion_kept"
"""Marks a node that nobody read when the graph was captured: it is there for its effect, and is never erased."""
_READ = "fxfusion_effects"  # where a graph keeps what `graph_effects` read

PURE_FUNCTIONS = frozenset(
    "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d affine_grid "
    "batch_norm binary_cross_entropy binary_cross_entropy_with_logits celu cross_entropy dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_alpha_dropout elu embedding fold glu grid_sample group_norm hardsigmoid "
    "hardswish hardtanh huber_loss instance_norm interpolate kl_div l1_loss layer_norm leaky_relu local_response_norm "
    "log_softmax lp_pool1d lp_pool2d max_pool1d max_pool2d max_pool3d mish mse_loss multi_head_attention_forward "
    "nll_loss normalize pad relu relu6 rms_norm rrelu selu sigmoid silu smooth_l1_loss softmax softmin softsign tanh "
    "tanhshrink threshold unfold atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod cdist "
    "chain_matmul einsum meshgrid norm split stft tensordot".split()
)
"""Functions of torch.nn.functional and torch.functional that are written in Python. They write nothing but what their
flags say: `inplace`, running statistics in training, `max_norm`."""
PURE_METHODS = frozenset(
    "bfloat16 bool byte char double float half int long short type ndimension nelement new_tensor dim_order".split()
)
"""Methods of tensors that have no ATen operation of their name."""
PURE_PYTHON = frozenset(
    (getattr, abs, bool, divmod, float, int, len, max, min, pow, round, slice, sum, torch.Size)
    + tuple(
        getattr(torch, name) for name in "sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum".split()
    )
    + tuple(
        getattr(operator, name)
        for name in "abs add and_ eq floordiv ge getitem gt index inv invert is_ is_not le lshift lt matmul mod mul ne "
        "neg not_ or_ pos pow rshift sub truediv truth xor".split()
    )
)
"""Functions of Python and of symbolic numbers."""
NOTHING = frozenset("_log_api_usage_once _assert_tensor_metadata".split())
"""Calls that may go: they count uses of torch, or assert what the capture has proved."""
CHECKS = frozenset(
    "_assert _assert_async _assert_scalar _functional_assert_async _functional_assert_scalar _check _check_index "
    "_check_is_size _check_not_implemented _check_tensor_all _check_type _check_value _check_with sym_constrain_range "
    "sym_constrain_range_for_size".split()
)
"""They stop a run or do nothing; they change no mode."""
MODE_SWITCHES = frozenset(
    "_enter_autocast _exit_autocast _set_grad_enabled set_grad_enabled _enter_inference_mode "
    "_exit_inference_mode _enter_dual_level _saved_tensors_hooks_disable _saved_tensors_hooks_enable".split()
)
VMAP = frozenset("_add_batch_dim _remove_batch_dim lazy_load_decompositions".split())
LEVELS = VMAP | frozenset(
    "_wrap_for_grad _unwrap_for_grad _set_tensor_requires_grad set_inplace_requires_grad_allowed _autograd_grad "
    "_make_dual _unpack_dual _vjp_treespec_compare".split()
)
"""Primitives of functorch: they write no value, and return what shows their first argument. Nothing passes them."""
RANDOM_OPS = frozenset(
    "rand rand_like randn randn_like randint randint_like randperm bernoulli multinomial normal uniform "
    "exponential geometric cauchy log_normal random poisson native_dropout rrelu_with_noise".split()
)
DROPOUT_OPS = frozenset(
    "dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split()
)
ALIASING_OPS = frozenset(
    "view reshape view_as reshape_as flatten unflatten transpose permute t mT T H swapaxes getitem select slice "
    "narrow chunk split split_with_sizes tensor_split unbind squeeze unsqueeze expand expand_as contiguous to "
    "type_as float double half bfloat16 alias detach dropout ravel diagonal as_strided movedim real "
    "numpy_T lift_fresh Identity getattr positive conj resolve_conj resolve_neg adjoint imag view_as_real "
    "view_as_complex moveaxis broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d hsplit vsplit dsplit "
    "unsafe_chunk unsafe_split sum_to_size unfold einsum cpu cuda bool int long short byte char alpha_dropout "
    "feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d meshgrid cartesian_prod chain_matmul "
    "pin_memory as_tensor asarray".split()
)
"""Operations whose result may share memory with their first tensor, whether or not their schema says so."""

_INPLACE_POSITION = (
    dict.fromkeys("relu relu6 selu silu mish hardswish hardsigmoid".split(), 1)
    | dict.fromkeys("elu celu leaky_relu".split(), 2)
    | dict.fromkeys("hardtanh threshold".split(), 3)
    | dict.fromkeys("dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d".split(), 3)
    | {"rrelu": 4}
)
_STATISTICS = dict.fromkeys(
    "batch_norm native_batch_norm _batch_norm_impl_index cudnn_batch_norm miopen_batch_norm".split(), "training"
) | {"instance_norm": "use_input_stats"}
"""Norms that write their running statistics without a word in their schema, and the flag (argument 5) that says so."""
_OWN = ("aten", "prims", "prim", "fxfusion")  # namespaces whose schemas are believed
_BY_ARGUMENTS = (
    DROPOUT_OPS
    | RANDOM_OPS
    | NOTHING
    | set(_STATISTICS)
    | set("setitem embedding embedding_bag lstm gru rnn_tanh rnn_relu multi_head_attention_forward".split())
)
_ACTING = frozenset(("aten::requires_grad_", "aten::_requires_grad_"))
_SPREAD = frozenset("broadcast_tensors meshgrid cartesian_prod chain_matmul atleast_1d atleast_2d atleast_3d".split())
_PLAIN = (int, float, bool, str, tuple, list, torch.SymInt, torch.SymFloat, torch.SymBool, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Effect:
    """`writes`: arguments that may be written. `draws`: random numbers. `switches`: changes autocast, grad or another
    mode for the nodes that follow, or may. `acts`: does something else that must stay where it is, or may.
    `unknown`: why it is not understood; empty where it is."""

    writes: tuple[fx.Node, ...] = ()
    draws: bool = False
    switches: bool = False
    acts: bool = False
    unknown: str = ""

    @property
    def is_none(self) -> bool:
        return not (self.writes or self.draws or self.switches or self.acts)


NONE = Effect()


def effect_of(node: fx.Node) -> Effect:
    """What the node does beside returning a value."""
    if node.op in ("placeholder", "get_attr", "output"):
        return NONE
    known = _known(node.op, node.target)
    flags = "out" in node.kwargs or "inplace" in node.kwargs
    if known.is_plain and not flags and (node.op == "call_function" or _has_plain_receiver(node)):
        return NONE
    if is_export_guard(node):
        return Effect(acts=True)
    if not known.is_understood or (node.op == "call_method" and not _has_plain_receiver(node)):
        writes = tuple(source for source in node.all_input_nodes if not ops.is_shape_value(source))
        switches = known.switches or not (known.is_registered and writes)
        return Effect(writes, draws=True, switches=switches, acts=True, unknown=f"{_words(node)} is not understood")
    if ops.op_name(node) in NOTHING:
        return NONE
    writes = tuple(dict.fromkeys(_written(node, known)))
    draws = is_random(node)
    if not (writes or draws or known.switches or known.acts):
        return NONE
    return Effect(writes, draws=draws, switches=known.switches, acts=known.acts)


def is_pure(node: fx.Node) -> bool:
    """Whether nothing but the result tells that the node ran. Not said of inputs and outputs."""
    return node.op not in ("placeholder", "output") and effect_of(node).is_none


def writes_in_place(node: fx.Node) -> bool:
    """Whether the node writes one of its arguments, or may."""
    return bool(effect_of(node).writes)


def shares_memory_with(node: fx.Node, effect: Effect | None = None) -> tuple[fx.Node, ...]:
    """The arguments that the result may share memory with. `effect`: the node's, where the caller knows it."""
    if node.op not in ("call_function", "call_method", "call_module") or _is_number(node):
        return ()
    effect = effect or effect_of(node)
    if effect.is_none and _known(node.op, node.target).shows_nothing:
        return ()
    if effect.unknown:
        return effect.writes
    if ops.op_name(node) in ALIASING_OPS:
        return effect.writes or tuple(_first_values(node))
    shown = (value for place in _known(node.op, node.target).shows for value in _given(node, place))
    return tuple(dict.fromkeys((*effect.writes, *shown)))


def is_random(node: fx.Node) -> bool:
    """Whether the node draws random numbers (a dropout in training mode with p > 0 does)."""
    name = ops.op_name(node)
    if name in DROPOUT_OPS:
        probability, training = dropout_arguments(node)
        return training is not False and probability != 0
    if name == "rrelu":
        return ops.argument(node, 3, "training", False) is not False
    if name.startswith("rrelu_with_noise"):
        return ops.argument(node, 4, "training", False) is not False
    if name == "scaled_dot_product_attention" and ops.argument(node, 4, "dropout_p", 0.0) == 0.0:
        return False  # its ATen tag says what it might do
    if name == "multi_head_attention_forward":
        return ops.argument(node, 10, "dropout_p") != 0.0 and ops.argument(node, 13, "training", True) is not False
    if name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        return not _inactive_dropout_of_recurrence(node)
    return name in RANDOM_OPS or _known(node.op, node.target).seeded


def dropout_arguments(node: fx.Node) -> tuple[Any, Any]:
    """`(p, training)` of a dropout node, literals or nodes."""
    probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    functional = not isinstance(node.target, OpOverload) and getattr(node.target, "__module__", "") != "torch"
    default = bool(functional)
    training = node.kwargs.get("training", node.kwargs.get("train", node.args[2] if len(node.args) > 2 else default))
    return probability, training


def is_higher_order(node: fx.Node) -> bool:
    """Whether the node calls a sub-graph (activation checkpointing, cond, flex attention)."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def records_gradients(graph: fx.Graph) -> bool:
    """Whether the graph may turn gradients on, or take them: levels of functorch, autograd, unknown code."""
    for node in graph.nodes:
        effect = effect_of(node)
        if not effect.switches:
            continue
        name = ops.op_name(node)
        if name in ("_set_grad_enabled", "set_grad_enabled"):
            if ops.argument(node, 0, "mode", True) is not False:
                return True
        elif name not in VMAP | MODE_SWITCHES - {"_enter_dual_level"} and not name.startswith("_vmap_"):
            return True
    return False


def autocasts(node: fx.Node, device: str, around: bool) -> bool:
    """Whether autocast for a type of device is on where a node stands. `around`: whether it is where the graph is
    called."""
    entered: dict[fx.Node, bool] = {}
    for before in node.graph.nodes:
        if before is node:
            break
        name = ops.op_name(before)
        if name == "_enter_autocast" and ops.argument(before, 0, "device_type", device) == device:
            entered[before] = ops.argument(before, 2, "enabled", True) is not False
        elif name == "_exit_autocast":
            entered.pop(before.all_input_nodes[0], None)
    return next(reversed(entered.values()), around)


class GraphEffects:
    """The effects of a whole graph. Values that may share memory are one class, named by its first node.

    `written`: classes that some node writes. `modes`: how many switches of a mode stand before each node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.order: dict[fx.Node, int] = {node: place for place, node in enumerate(graph.nodes)}
        self.of: dict[fx.Node, Effect] = {node: effect_of(node) for node in graph.nodes}
        self._first: dict[fx.Node, fx.Node] = {}
        self._members: dict[fx.Node, list[fx.Node]] = {}
        self._join_values()
        if any(effect.writes for effect in self.of.values()):
            self._join_storages()
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        for node, effect in self.of.items():
            for root in dict.fromkeys(map(self.root, effect.writes)):
                self._writers.setdefault(root, []).append(node)
        self.written = frozenset(self._writers)
        self.modes: dict[fx.Node, int] = {}
        switches = 0
        for node, effect in self.of.items():
            switches += effect.switches
            self.modes[node] = switches

    def root(self, node: fx.Node) -> fx.Node:
        """The first value of those that may share memory with the node's."""
        while node in self._first:
            node = self._first[node]
        return node

    def members(self, node: fx.Node) -> list[fx.Node]:
        """All values that may share memory with the node's, itself included."""
        root = self.root(node)
        return self._members.get(root, [root])

    def writers_of(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes that write the value, or one that may share its memory, in graph order."""
        return tuple(self._writers.get(self.root(node), ()))

    def escapes(self, node: fx.Node) -> bool:
        """Whether the caller of the graph gets the value, or something that may share its memory."""
        return any(user.op == "output" for member in self.members(node) for user in member.users)

    def is_private(self, node: fx.Node) -> bool:
        """Whether the memory was made in the graph, and only understood operations touch it before it is returned."""
        members = self.members(node)
        return not any(
            member.op in ("placeholder", "get_attr") or self.of.get(each, NONE).unknown
            for member in members
            for each in (member, *member.users)
        )

    def late_readers(self, write: fx.Node, written: fx.Node) -> dict[fx.Node, fx.Node]:
        """Who reads memory behind a write otherwise than through its result, and which value they read.

        What is computed from the result, or from the written value behind the write, does not count.
        """
        place = self.order[write]
        behind = {user for user in written.users if self.order.get(user, place) > place}
        follow = ops.reached({write} | behind, lambda node: node.users)
        others = set(self.members(written)) - follow.keys() - {written}
        found = {user: member for member in others for user in member.users if self.order.get(user, -1) > place}
        return found | dict.fromkeys(behind, written)

    def observable(self) -> list[fx.Node]:
        """The nodes whose effects can be seen from outside, in order: not writes to memory made in the graph."""
        return [node for node, effect in self.of.items() if not effect.is_none and self._is_seen(effect)]

    def _is_seen(self, effect: Effect) -> bool:
        return effect.draws or effect.switches or effect.acts or not all(map(self.is_private, effect.writes))

    def _join_values(self) -> None:
        for node, effect in self.of.items():
            for source in shares_memory_with(node, effect):
                self._join(source, node)

    def _join_storages(self) -> None:
        """Inputs and weights may be views of one storage."""
        by_storage: dict[int, fx.Node] = {}
        for node in self.of:
            value = ops.tensor_value(node) if node.op in ("placeholder", "get_attr") else None
            storage = _storage_of(value)
            if storage is not None:
                self._join(by_storage.setdefault(storage, node), node)

    def _join(self, one: fx.Node, other: fx.Node) -> None:
        one, other = self.root(one), self.root(other)
        if one is other:
            return
        first, second = (one, other) if self.order[one] < self.order[other] else (other, one)
        self._first[second] = first
        self._members.setdefault(first, [first]).extend(self._members.pop(second, [second]))


def graph_effects(graph: fx.Graph) -> GraphEffects:
    """The effects of the graph, read once while it stays as it is.

    They are kept on the graph with all that they were read from, and read anew where one of these is another object:
    nodes and their order, targets, arguments (fx never changes them in place), example values.
    """
    read_from = _read_from(graph)
    kept: tuple[list[Any], GraphEffects] | None = vars(graph).get(_READ)
    if kept is None or len(kept[0]) != len(read_from) or not all(map(operator.is_, kept[0], read_from)):
        kept = vars(graph)[_READ] = (read_from, GraphEffects(graph))
    return kept[1]


def forget_effects(graph: fx.Graph) -> None:
    """Take off the graph what `graph_effects` keeps there, erased nodes among it."""
    vars(graph).pop(_READ, None)


def _read_from(graph: fx.Graph) -> list[Any]:
    found: list[Any] = []
    for node in graph.nodes:
        meta = node.meta
        found += (node, node.target, node.args, node.kwargs, meta.get("example_value"), meta.get("val"))
    return found


def keep_unread(nodes: Iterable[fx.Node]) -> None:
    """Mark what nobody read at capture: it is there for its effect (see `KEPT`)."""
    for node in nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            node.meta[KEPT] = True


_Place = tuple[int | None, str, bool]  # position, where it has one; name; whether it takes a list


@dataclass(frozen=True, slots=True)
class _Known:
    """What is known of an operation whatever its arguments. `is_registered`: the dispatcher calls it, so it changes no
    mode for others. `is_plain`: pure whatever its arguments are, but for `out` and `inplace`. `writes`, `shows`:
    arguments written, and shown by the result. `shows_nothing`: no result shares memory with an argument not written.
    """

    is_understood: bool = False
    is_registered: bool = False
    switches: bool = False
    acts: bool = False
    seeded: bool = False
    is_plain: bool = False
    shows_nothing: bool = False
    writes: tuple[_Place, ...] = ()
    shows: tuple[_Place, ...] = ()


@lru_cache(maxsize=4096)
def _known(op: str, target: Any) -> _Known:
    known = _looked_up(op, target)
    name, in_place = ops.bare_name(op, target)
    depends = in_place or name in _BY_ARGUMENTS or name in _INPLACE_POSITION or target is operator.setitem
    does = known.writes or known.seeded or known.acts or known.switches
    shows_nothing = known.is_understood and not known.shows and name not in ALIASING_OPS
    return replace(known, is_plain=known.is_understood and not (depends or does), shows_nothing=shows_nothing)


def _looked_up(op: str, target: Any) -> _Known:
    if op == "call_method":
        return _method(str(target))
    if isinstance(target, HigherOrderOperator):
        return _Known(is_registered=True)
    if op != "call_function":
        return _Known()
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return _registered(target)
    if target in PURE_PYTHON or target in ops.IN_PLACE_OPERATORS or target is operator.setitem:
        return _Known(is_understood=True)
    return _function(target, ops.bare_name(op, target)[0])


def _method(target: str) -> _Known:
    name, in_place = ops.bare_name("call_method", target)
    if target in PURE_METHODS or (in_place and target.startswith("__")):
        return _Known(is_understood=True)
    names = (target, target.strip("_"), name) if target.startswith("__") else (target,)
    return next(filter(None, (_from_aten(each, of_tensors=True) for each in names)), _Known())


def _function(target: Any, name: str) -> _Known:
    module = getattr(target, "__module__", None) or type(getattr(target, "__self__", None)).__module__
    if module == "math":
        return _Known(is_understood=True)
    if not (module == "torch" or module.startswith("torch.")):
        return _Known()
    if name in MODE_SWITCHES or name.endswith(("_increment_nesting", "_decrement_nesting")):
        return _Known(is_understood=True, switches=True)
    if name in LEVELS and module.startswith(("torch._functorch", "torch._C._functorch", "torch.func")):
        return _Known(is_understood=True, switches=True, shows=((0, "tensor", False),))
    if name in NOTHING | CHECKS:
        return _Known(is_understood=True, acts=True)
    if isinstance(target, FunctionType):
        granted = name in PURE_FUNCTIONS and module in ("torch.nn.functional", "torch.functional")
        return _Known(is_understood=granted)
    return _from_aten(getattr(target, "__name__", "")) or _Known()


def _registered(target: Any) -> _Known:
    overloads = [target] if isinstance(target, OpOverload) else _overloads(target)
    if not overloads or not {overload.namespace for overload in overloads} <= set(_OWN):
        return _Known(is_registered=True)
    return _from_schemas(overloads)


def _overloads(packet: OpOverloadPacket) -> list[OpOverload]:
    return [getattr(packet, name) for name in packet.overloads()]


def _from_aten(name: str, of_tensors: bool = False) -> _Known | None:
    """What the schemas of ATen's operation of that name say; None where there is none (for tensors)."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, OpOverloadPacket):
        return None
    overloads = [each for each in _overloads(packet) if not of_tensors or _takes_tensor(each._schema.arguments[:1])]
    # Overloads for lists of TorchScript (`sort`, `add_`) are none of the dispatcher's, and none of Python's.
    dispatched = [each for each in overloads if each.name() in dispatcher_operations()]
    if not dispatched and not all(each._schema.returns for each in overloads):
        return None
    return _from_schemas(dispatched or overloads) if overloads else None


def _from_schemas(overloads: Sequence[OpOverload]) -> _Known:
    """Together: what one of the overloads writes may be written."""
    writes: dict[_Place, None] = {}
    shows: dict[_Place, None] = {}
    plain = [each for each in overloads if not any(argument.is_out for argument in each._schema.arguments)] or overloads
    for overload in overloads:
        shown = any(result.alias_info is not None for result in overload._schema.returns)
        for place, argument in enumerate(overload._schema.arguments):
            if argument.alias_info is None or not _takes_tensor([argument]):
                continue
            found = (None if argument.kwarg_only else place, argument.name, str(argument.type).startswith("List["))
            if argument.alias_info.is_write:
                writes[found] = None
            elif shown:
                shows[found] = None
    return _Known(
        is_understood=True,
        is_registered=True,
        acts=any(not each._schema.returns or each._schema.name in _ACTING for each in plain),
        seeded=any(torch.Tag.nondeterministic_seeded in each.tags for each in plain),
        writes=tuple(writes),
        shows=tuple(shows),
    )


def _takes_tensor(arguments: Sequence[Any]) -> bool:
    return any("Tensor" in str(argument.type) for argument in arguments)


def _written(node: fx.Node, known: _Known) -> Iterator[fx.Node]:
    """The arguments that an understood node writes."""
    name = ops.op_name(node)
    yield from ops.nodes_of(node.kwargs.get("out"))
    inactive = name in DROPOUT_OPS and dropout_arguments(node)[1] is False
    if not inactive and (ops.bare_name(node.op, node.target)[1] or _asks_in_place(node, name)):
        yield from ops.nodes_of(ops.argument(node, 0, "input", node.kwargs.get("self")))
    if name in _STATISTICS and ops.argument(node, 5, _STATISTICS[name], name == "instance_norm") is not False:
        # Where they stand depends on the spelling, so all that is read but the input counts.
        yield from ops.nodes_of((node.args[1:], {k: v for k, v in node.kwargs.items() if k != "input"}))
    if name in ("embedding", "embedding_bag") and ops.argument(node, 3, "max_norm") not in (None, False):
        yield from ops.nodes_of(ops.argument(node, 1, "weight"))
    for place in known.writes:
        yield from _given(node, place)


def _given(node: fx.Node, place: _Place) -> Iterator[fx.Node]:
    """The nodes in an argument. An overload that takes a list is not the one that got a tensor."""
    position, name, is_list = place
    value = node.kwargs.get(name, node.kwargs.get("input") if name == "self" else None)
    if value is None and position is not None and len(node.args) > position:
        value = node.args[position]
    if is_list and isinstance(value, fx.Node) and ops.tensor_value(value) is not None:
        return
    yield from ops.nodes_of(value)


def _asks_in_place(node: fx.Node, name: str) -> bool:
    """`F.relu(x, inplace=True)`, `F.relu(x, True)`, `F.dropout(x, p, training, True)`; a flag of unknown value may."""
    if node.op == "call_method" or isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return False
    position = _INPLACE_POSITION.get(name)
    positional = position is not None and len(node.args) > position and node.args[position] is not False
    return positional or node.kwargs.get("inplace", False) is not False


def _inactive_dropout_of_recurrence(node: fx.Node) -> bool:
    """`lstm(x, hx, params, has_biases, num_layers, dropout, train, ...)`, or with `batch_sizes` before `hx`."""
    for dropout, training in ((5, 6), (6, 7)):
        if len(node.args) > training and type(node.args[dropout]) is float and type(node.args[training]) is bool:
            return bool(node.args[dropout] == 0.0) or node.args[training] is False
    return False


def _has_plain_receiver(node: fx.Node) -> bool:
    """Whether a method is one of a tensor, a number or a tuple: those of streams, events and others may do anything."""
    receiver = node.args[0] if node.args else None
    if not isinstance(receiver, fx.Node):
        return isinstance(receiver, _PLAIN)
    value = ops.example(receiver)
    return value is None or isinstance(value, (torch.Tensor, *_PLAIN))


def _is_number(node: fx.Node) -> bool:
    """Whether the capture recorded a result without tensors: a size, a number, a dtype."""
    return ops.is_shape_value(node) and ops.example(node) is not None


def _first_values(node: fx.Node) -> Iterator[fx.Node]:
    """The first argument's tensors: one, or those of a list."""
    first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
    if isinstance(first, str) and len(node.args) > 1:
        first = node.args[1:]  # an equation goes before what it is about
    yield from ops.nodes_of(node.args if ops.op_name(node) in _SPREAD else first)


def _storage_of(value: torch.Tensor | None) -> int | None:
    if value is None or type(value).__name__ == "UntypedStorage":
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None  # sparse and wrapped tensors have none


def _words(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"the module {node.target} could not be opened, so it"
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return str(node.target)
    return ops.op_name(node) or str(node.target)
