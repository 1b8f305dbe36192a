"""Where a node comes from, in the user's own words."""

from __future__ import annotations

import pytest
from torch import fx

from fxfusion.graph import provenance


def node(*paths: str, trace: str = "") -> fx.Node:
    found = fx.Graph().placeholder("x")
    found.meta["nn_module_stack"] = {str(index): (path, object) for index, path in enumerate(paths)}
    found.meta["stack_trace"] = trace
    return found


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("L['self'].model._modules['layers']._modules['3']", "model.layers.3"),
        ("L['self'].model.layers[3].mlp", "model.layers.3.mlp"),
        ("L__self___model.layers.3", "L__self___model.layers.3"),
        ("L['fn'].layers['0'].ffn", "layers.0.ffn"),
        ("model.layers.3.mlp", "model.layers.3.mlp"),
        ("L['self']", ""),
        ("", ""),
    ],
)
def test_clean_path(raw: str, clean: str) -> None:
    assert provenance.clean_path(raw) == clean


def test_the_innermost_module_counts() -> None:
    assert provenance.module_path(node("model", "model.layers.1", "model.layers.1.mlp")) == "model.layers.1.mlp"
    assert provenance.module_path(fx.Graph().placeholder("x")) == ""


def test_enclosing_modules_are_listed_from_the_outside_in() -> None:
    found = node("L['self']", "L['self'].model", "L['self'].model.layers[1]", "L['self'].model.layers[1].mlp")
    assert provenance.enclosing_modules(found) == ["model", "model.layers.1", "model.layers.1.mlp"]
    assert provenance.enclosing_modules(fx.Graph().placeholder("x")) == []


def test_common_path_passes_over_nodes_without_provenance() -> None:
    nodes = [node("a.layers.3.mlp.gate"), fx.Graph().placeholder("x"), node("a.layers.3.mlp.down")]
    assert provenance.common_path(nodes) == "a.layers.3.mlp"
    assert provenance.common_path([node("a.b"), node("c.d")]) == ""
    assert provenance.common_path([node("a.layers.1"), node("a.layers.10")]) == "a.layers"
    assert provenance.common_path([]) == ""


@pytest.mark.parametrize(
    ("paths", "layer"),
    [
        (("model.layers.3.mlp", "model.layers.3"), "model.layers.3"),
        (("model.layers.3.mlp.experts.0.up", "model.layers.3.mlp.experts.0.down"), "model.layers.3.mlp.experts.0"),
        (("model.mlp", "model.mlp"), ""),
    ],
)
def test_layer_path_is_cut_after_the_last_number(paths: tuple[str, ...], layer: str) -> None:
    assert provenance.layer_path([node(path) for path in paths]) == layer


@pytest.mark.parametrize(
    ("paths", "numbers"),
    [
        (["model.layers.0", "model.layers.1"], [0, 1]),
        (["block.0.layer.1", "block.1.layer.1", "block.2.layer.1"], [0, 1, 2]),
        (["stage.0.block.0", "stage.0.block.1", "stage.0.block.2"], [0, 1, 2]),
        (["mlp", "ffn"], [None, None]),
        (["layers.4", "head"], [4, None]),
        ([], []),
    ],
)
def test_the_number_that_tells_layers_apart(paths: list[str], numbers: list[int | None]) -> None:
    assert provenance.layer_numbers(paths) == numbers


def test_source_line_is_the_innermost_frame_without_its_folder() -> None:
    trace = '  File "/a/model.py", line 12, in forward\n    x\n  File "/b/mlp.py", line 7, in forward\n    y\n'
    assert provenance.source_line(node(trace=trace)) == "mlp.py:7"
    assert provenance.source_line(node()) == ""


def test_created_nodes_say_who_made_them_from_what() -> None:
    source, target = node("layers.1.ffn", trace="t"), fx.Graph().placeholder("y")
    provenance.copy_provenance(source, target, "concatenate", ["layers.1.ffn", "layers.2.ffn"])
    assert provenance.module_path(target) == "layers.1.ffn"
    assert target.meta["fxfusion"] == {"pass": "concatenate", "from": ["layers.1.ffn", "layers.2.ffn"]}
