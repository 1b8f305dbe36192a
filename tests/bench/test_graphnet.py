"""Graphs of other people's models, on samples written for these tests: rebuilt, fused, checked, counted."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.graphnet import _crashed_again, analysed, check_group, empty, main, measure, without_mixers
from bench.graphnet_samples import NotRebuilt, rebuild, samples
from bench.record import Record

HIDDEN, WIDTH, TOKENS = 8, 12, 5
HEAD = (
    "import torch\nfrom torch import device\n\nclass GraphModule(torch.nn.Module):\n    def forward(self, {inputs}):\n"
)


def ffn(layer: int, stream: str, out: str, add: str = "{out} = {stream} + down_{layer}") -> list[str]:
    """A residual FFN, as the code generator of fx writes it."""
    weight = f"L_self_modules_layers_modules_{layer}_parameters"
    return [
        f"normed_{layer} = torch.nn.functional.layer_norm({stream}, ({HIDDEN},), {weight}_gain_, None, 1e-05)",
        f"up_{layer} = torch._C._nn.linear(normed_{layer}, {weight}_up_, None)",
        f"normed_{layer} = None",
        f"act_{layer} = torch.nn.functional.silu(up_{layer})",
        f"drop_{layer} = torch.nn.functional.dropout(act_{layer}, 0.1, False, False)",
        f"down_{layer} = torch._C._nn.linear(drop_{layer}, {weight}_down_, None)",
        *add.format(out=out, stream=stream, layer=layer).split("; "),
    ]


def attention(stream: str, out: str) -> list[str]:
    return [
        f"flat = torch._C._nn.linear({stream}, L_self_parameters_in_, None)",
        f"view = flat.view(1, {TOKENS}, 2, 4)",
        "heads = view.transpose(1, 2)",
        "mixed = torch._C._nn.scaled_dot_product_attention(heads, heads, heads, is_causal = True)",
        "back = mixed.transpose(1, 2)",
        f"joined = back.reshape(1, {TOKENS}, {HIDDEN})",
        "out_projection = torch._C._nn.linear(joined, L_self_parameters_out_, None)",
        f"{out} = {stream} + out_projection",
    ]


def sample(folder: Path, name: str, lines: list[str], **more: list[int]) -> Path:
    """A folder as GraphNet has them; its inputs are those that the lines read."""
    shapes = {
        "L_x_": [1, TOKENS, HIDDEN],
        "L_self_parameters_in_": [HIDDEN, HIDDEN],
        "L_self_parameters_out_": [HIDDEN, HIDDEN],
        **more,
    }
    for layer in range(4):
        weight = f"L_self_modules_layers_modules_{layer}_parameters"
        shapes |= {f"{weight}_gain_": [HIDDEN], f"{weight}_up_": [WIDTH, HIDDEN], f"{weight}_down_": [HIDDEN, WIDTH]}
    text = "\n".join(lines)
    used = {given: shape for given, shape in shapes.items() if given in text}
    path = folder / "family" / name
    path.mkdir(parents=True)
    kinds = {given: "torch.Tensor" if given == "L_x_" else "torch.nn.parameter.Parameter" for given in used}
    head = HEAD.format(inputs=", ".join(f"{given}: {kind}" for given, kind in kinds.items()))
    (path / "model.py").write_text(head + "".join(f"        {line}\n" for line in lines))
    (path / "graph_net.json").write_text("{}")
    meta = [
        f'class Program_weight_tensor_meta_{given}:\n    name = "{given}"\n    shape = {shape}\n'
        f'    dtype = "torch.float32"\n    device = "cuda:0"\n    mean = 0.0\n    data = None\n'
        for given, shape in used.items()
    ]
    (path / "weight_meta.py").write_text("\n\n".join(meta))
    return path


CHAIN = [*ffn(0, "L_x_", "x_1"), *ffn(1, "x_1", "x_2"), "return (x_2,)"]
MIXED = [*ffn(0, "L_x_", "x_1"), *attention("x_1", "x_2"), *ffn(1, "x_2", "x_3"), "return (x_3,)"]


def test_a_chain_is_rebuilt_fused_and_found_right(tmp_path: Path) -> None:
    found = empty()
    measure(sample(tmp_path, "chain", CHAIN), found, tmp_path)
    form = found["as it is"]
    assert (found["graphs"], form["groups"], form["members_run"], form["groups_run"]) == (1, 1, 2, 1)
    assert 0 < form["largest_error"] < 1e-12 and not found["crashes"] + form["wrong"] + form["false"]
    assert found["mixers removed"]["graphs"] == 0, "there is no mixer to remove"


def test_without_its_mixer_a_graph_has_a_group(tmp_path: Path) -> None:
    found = empty()
    measure(sample(tmp_path, "mixed", MIXED), found, tmp_path)
    assert found["as it is"]["groups"] == 0
    assert found["as it is"]["refusals"] == {"token_mixing": 1, "alone": 1, "stream_read": 1}
    assert (found["mixers removed"]["groups"], found["mixers removed"]["groups_run"]) == (1, 1)
    assert found["mixers removed"]["wrong"] == found["mixers removed"]["false"] == []


def test_writes_stay_in_place(tmp_path: Path) -> None:
    lines = [
        *ffn(0, "L_x_", "x_1", "down_{layer} += {stream}; {out} = down_{layer}; down_{layer} = None"),
        "x_1[(..., 0)] = 0",
        "setitem = x_1",
        "setitem = None",
        "x_2 = x_1.mul_(2)",
        "return (x_2,)",
    ]
    graph = rebuild(sample(tmp_path, "written", lines)).module.graph
    targets = [node.target for node in graph.nodes]
    assert operator.iadd in targets and operator.setitem in targets and "mul_" in targets


def test_everything_has_a_fake_value_on_the_cpu_and_weights_are_known(tmp_path: Path) -> None:
    lines = ["ones = torch.ones([5, 8], device = device(type='cuda', index=0))", "y = L_x_ + ones", "z = y.cuda()"]
    captured = rebuild(sample(tmp_path, "device", [*lines, *ffn(0, "z", "x_1"), "return (x_1,)"]))
    values = [node.meta["example_value"] for node in captured.module.graph.nodes if node.op != "output"]
    assert {value.device.type for value in values} == {"cpu"}
    assert len(captured.weights) == 3 and "l_x_" not in captured.weights


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("y = torch.load('weights.pt')", "torch.load is not let in"),
        ("y = torch.from_file('weights.pt')", "torch.from_file is not let in"),
        ("y = torch.hub.load('a', 'b')", "torch.hub.load is not let in"),
        ("y = torch.no_such_thing(L_x_)", "this torch has no torch.no_such_thing"),
        ("y = open('file')", "a call of open is not understood"),
        ("y = L_x_.__class__", "the private attribute __class__ is not let in"),
        ("y = torch.serialization", "torch.serialization is no value that a graph may hold"),
        ("y = other + 1", "a name is read that nothing has given a value"),
        ("import os", "a statement Import is not understood"),
        ("y = [each for each in L_x_]", "an expression ListComp is not understood"),
        ("y, z = L_x_", "an assignment to Tuple is not understood"),
        ("y = 1 < L_x_ < 2", "a chain of comparisons is not understood"),
        ("y = L_x_ in L_x_", "an operator In is not understood"),
        ("y = (1).bit_length()", "an attribute or method of something that is no value of the graph"),
        ("y = torch.nn.functional.linear(L_x_, L_x_)", "linear does not run on fake tensors: RuntimeError"),
    ],
)
def test_what_cannot_be_rebuilt_says_why(line: str, reason: str, tmp_path: Path) -> None:
    path = sample(tmp_path, "odd", ["x = L_x_", line, "return (x,)"])
    with pytest.raises(NotRebuilt) as caught:
        rebuild(path)
    assert str(caught.value) == reason
    found = empty()
    measure(path, found, tmp_path)
    assert found["not_rebuilt"] == {reason: 1} and found["graphs"] == 0


def test_an_input_without_facts_is_said(tmp_path: Path) -> None:
    path = sample(tmp_path, "bare", CHAIN)
    (path / "weight_meta.py").unlink()
    with pytest.raises(NotRebuilt, match="weight_meta.py says nothing of an input"):
        rebuild(path)


def test_modes_entered_by_a_graph_that_stops_are_left(tmp_path: Path) -> None:
    lines = [
        "entered = torch.amp.autocast_mode._enter_autocast('cpu', torch.bfloat16, True, False)",
        "lazy = torch._C._functorch._vmap_increment_nesting(3, 'error')",
        "off = torch._C._set_grad_enabled(False)",
        "y = torch.nn.functional.linear(L_x_, L_x_)",
        "return (y,)",
    ]
    with pytest.raises(NotRebuilt, match="linear does not run"):
        rebuild(sample(tmp_path, "modes", lines))
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    assert torch._C._functorch.maybe_current_level() is None


def test_a_crash_is_counted_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("bench.graphnet.fuse_captured", broken)
    found = empty()
    measure(sample(tmp_path, "chain", CHAIN), found, tmp_path)
    assert {(one["graph"], one["error"]) for one in found["crashes"]} == {("family/chain", "KeyError: 'lost'")}
    assert found["as it is"]["graphs"] == 0, "half a measurement does not count"
    monkeypatch.undo()
    _crashed_again(found, tmp_path)
    assert found["crashes"] == [] and found["as it is"]["groups"] == 1


# --- the checks can fail ----------------------------------------------------------------------------------


def test_a_group_over_a_mixer_is_false(tmp_path: Path) -> None:
    captured = rebuild(sample(tmp_path, "mixed", MIXED))
    first, second = analysed(captured).matches.ffns
    group = replace(analysed(without_mixers(captured)).groups[0], members=(first, second))
    assert not check_group(analysed(without_mixers(captured)).groups[0], captured.weights).false
    assert check_group(group, captured.weights).false


def test_a_group_whose_stream_is_read_elsewhere_is_false(tmp_path: Path) -> None:
    captured = rebuild(sample(tmp_path, "chain", CHAIN))
    group = analysed(captured).groups[0]
    assert not check_group(group, captured.weights).false
    middle = group.members[0].add
    graph = middle.graph
    output = graph.output_node()
    output.args = ((*output.args[0], middle),)
    assert check_group(group, captured.weights).false.startswith("read from outside")


def test_a_fused_form_that_is_not_the_parallel_form_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.graphnet.Region.parallel", lambda self, values: self.sequential(values)[-1])
    found = empty()
    measure(sample(tmp_path, "chain", CHAIN), found, tmp_path)
    assert [one["why"][:6] for one in found["as it is"]["wrong"]] == ["off by"]


# --- the command ------------------------------------------------------------------------------------------


def test_the_command_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        sample(tmp_path, name, CHAIN)
    out = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["graphnet", str(tmp_path), "--out", str(out)])
    assert main() == 0
    once = Record.read(out).results
    assert (once["samples_done"], once["graphs"], once["as it is"]["groups"]) == (2, 2, 2)
    assert once["as it is"]["cpu_seconds_per_1000_nodes"] > 0
    assert main() == 0
    assert Record.read(out).results == once, "all was done already"


def test_a_folder_without_samples_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="holds no samples: expected folders with model.py"):
        samples(tmp_path)
    monkeypatch.setattr("sys.argv", ["graphnet", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
