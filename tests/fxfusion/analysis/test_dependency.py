from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfusion.analysis.batches import read_batches
from fxfusion.analysis.dependency import DependencyMatrix, dependency_matrix, measure_batch
from fxfusion.errors import CaptureError, OptionError
from fxfusion.models.traced import TracedModel
from tests.end_to_end.families import first_tensor, layers_of
from tests.fxfusion.models import tiny
from tests.fxfusion.models.tiny import Causal, causal, family_model, token_ids, traced_family

VOCABULARY = tiny.VOCABULARY


# --- brute force: hooks on the modules, no graph ------------------------------------------------------


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


class Recorder:
    """Stream and contribution of each module, and modules whose contribution is taken out.

    `adds`: whether a module adds to the stream itself (a layer), or returns what is added (an FFN, whose
    stream is what enters the norm before it).
    """

    def __init__(self, model: nn.Module, modules: Sequence[nn.Module], norms: Sequence[nn.Module] | None) -> None:
        self.model, self.modules, self.norms = model, modules, norms
        self.streams: dict[int, Tensor] = {}
        self.contributions: dict[int, Tensor] = {}

    def run(self, ids: Tensor, removed: int | None = None, zeroed: Sequence[nn.Module] = (), **inputs: Any) -> Recorder:
        handles = [module.register_forward_hook(tiny.zero, with_kwargs=True) for module in zeroed]
        for index, module in enumerate(self.modules):
            handles.append(module.register_forward_hook(self._note(index, index == removed), with_kwargs=True))
            if self.norms is not None:
                handles.append(self.norms[index].register_forward_pre_hook(self._note_stream(index)))
        with hooks(handles), torch.no_grad():
            self.model(ids, **inputs)
        return self

    def _note(self, index: int, is_removed: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            value = first_tensor(output)
            if self.norms is not None:
                self.contributions[index] = value
                left = torch.zeros_like(value)
            else:
                left = self.streams[index] = args[0] if args else kwargs["hidden_states"]
                self.contributions[index] = value - left
            if is_removed:
                return left if isinstance(output, Tensor) else type(output)((left, *output[1:]))
            return None

        return hook

    def _note_stream(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.streams[index] = args[0]

        return hook


def angle(one: Tensor, other: Tensor) -> Tensor:
    return F.cosine_similarity(one.double(), other.double(), dim=-1)


def brute_force(
    model: nn.Module,
    batches: Sequence[Tensor],
    modules: Sequence[nn.Module],
    norms: Sequence[nn.Module] | None = None,
    zeroed: Sequence[nn.Module] = (),
    masks: Sequence[Tensor] | None = None,
    **inputs: Any,
) -> dict[str, Tensor]:
    count = len(modules)
    values, others = torch.zeros(count, count).double(), torch.zeros(3, count).double()
    tokens = 0
    for number, ids in enumerate(batches):
        seen = masks[number].bool() if masks is not None else torch.ones(ids.shape, dtype=torch.bool)
        given = inputs | ({"attention_mask": masks[number]} if masks is not None else {})
        intact = Recorder(model, modules, norms).run(ids, None, zeroed, **given)
        tokens += int(seen.sum())
        for row in range(count):
            x, h = intact.streams[row][seen], intact.contributions[row][seen]
            others[0, row] += angle(x, x + h).sum()
            others[1, row] += (h.norm(dim=-1) / x.norm(dim=-1)).sum()
            others[2, row] += angle(h, x).sum()
            without = Recorder(model, modules, norms).run(ids, row, zeroed, **given)
            for column in range(row + 1, count):
                similarity = angle(intact.contributions[column][seen], without.contributions[column][seen])
                values[row, column] += (1 - similarity).sum()
    cosine, ratio, contribution_cosine = others / tokens
    return {"values": values / tokens, "cosine": cosine, "ratio": ratio, "contribution_cosine": contribution_cosine}


def assert_equal(found: DependencyMatrix, expected: dict[str, Tensor], limit: float = 1e-5) -> None:
    for name, value in expected.items():
        assert torch.allclose(getattr(found, name).double(), value, rtol=0, atol=limit), name
    upper = expected["values"][torch.triu(torch.ones_like(expected["values"]), 1).bool()]
    assert float(upper.min()) > 10 * limit  # so that zeros would not do
    assert torch.equal(found.values, torch.triu(found.values, 1))


def tiny_modules(model: Causal) -> tuple[list[nn.Module], list[nn.Module]]:
    return [layer.ffn for layer in model.layers], [layer.norm for layer in model.layers]


# --- against brute force ------------------------------------------------------------------------------


def test_ffns_of_a_hand_written_model() -> None:
    model = causal(*[tiny.plain] * 4)
    batches = [token_ids(2, 6), token_ids(3, 5, seed=2)]
    found = dependency_matrix(model, batches)
    assert_equal(found, brute_force(model, batches, *tiny_modules(model)))
    assert found.unit == "ffn" and found.layers == (0, 1, 2, 3) and found.attention == (0, 1, 2, 3)
    assert found.names == tuple(f"layers.{layer}.ffn" for layer in range(4))
    assert (found.tokens, found.sequences, found.dropped_attention) == (2 * 6 + 3 * 5, 5, ())
    assert found.values.dtype is found.ratio.dtype is torch.float32


@pytest.mark.parametrize("form", [tiny.parallel, tiny.scaled_output, tiny.in_place, tiny.two_mixers, tiny.flat_ffn])
def test_blocks_of_hand_written_models(form: Callable[..., Tensor]) -> None:
    model, ids = causal(*[form] * 3), token_ids()
    # Hooks on a stream that is written in place would see it as it becomes, so its twin is watched.
    watched = causal(*[tiny.plain if form is tiny.in_place else form] * 3)
    assert torch.equal(watched(ids), model(ids))
    expected = brute_force(watched, [ids], list(watched.layers))
    assert_equal(dependency_matrix(model, [ids], unit="block"), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_blocks_of_transformers_models(name: str) -> None:
    family, model = family_model(name)
    batches = [torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))]
    found = dependency_matrix(traced_family(name), batches, unit="block")
    assert_equal(found, brute_force(model, batches, layers_of(model, family), use_cache=False))
    assert found.names == tuple(f"{family.layers}.{layer}" for layer in range(4))


@pytest.mark.parametrize("dropped", [(), (1, 2)], ids=str)
def test_ffns_of_a_transformers_model_with_and_without_attention(dropped: tuple[int, ...]) -> None:
    family, model = family_model("llama")
    batches = [torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(1))]
    layers = layers_of(model, family)
    expected = brute_force(
        model,
        batches,
        [layer.mlp for layer in layers],
        [layer.post_attention_layernorm for layer in layers],
        zeroed=[layers[layer].self_attn for layer in dropped],
        use_cache=False,
    )
    found = dependency_matrix(traced_family("llama"), batches, dropped_attention=dropped)
    assert_equal(found, expected)
    assert found.dropped_attention == dropped
    assert found.attention == tuple(layer for layer in range(4) if layer not in dropped)


def test_parallel_ffns_can_be_measured_where_their_attention_is_gone() -> None:
    model, ids = causal(*[tiny.parallel] * 4), token_ids()
    found = dependency_matrix(model, [ids], dropped_attention=[1, 3])
    assert found.layers == (1, 3)
    layers = [model.layers[1], model.layers[3]]
    zeroed = [layer.mix for layer in layers]
    expected = brute_force(model, [ids], [layer.ffn for layer in layers], [layer.norm for layer in layers], zeroed)
    assert_equal(found, expected)


def test_padding_and_labels_leave_tokens_out() -> None:
    family, model = family_model("llama")
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    found = dependency_matrix(model, [{"input_ids": ids, "attention_mask": mask}], unit="block")
    expected = brute_force(model, [ids], layers_of(model, family), masks=[mask], use_cache=False)
    assert_equal(found, expected)
    assert found.tokens == 10
    everywhere = dependency_matrix(traced_family("llama"), [ids], unit="block")
    assert not torch.allclose(found.values, everywhere.values, rtol=0, atol=1e-3)
    labels = ids.masked_fill(mask == 0, -100)
    labelled = dependency_matrix(traced_family("llama"), [{"input_ids": ids, "labels": labels}], unit="block")
    assert labelled.tokens == 10 and not torch.equal(labelled.values, everywhere.values)


def test_the_prefix_is_reused_to_the_same_bits() -> None:
    model = causal(*[tiny.plain] * 3)
    (batch,) = read_batches([token_ids()])
    graph = TracedModel(model).graph(batch.inputs)
    again = TracedModel(model).graph(batch.inputs)
    object.__setattr__(again._resumption, "can_resume", False)
    reused, repeated = (measure_batch(found, batch, "ffn") for found in (graph, again))
    assert all(torch.equal(reused[name], repeated[name]) for name in reused)


def test_half_precision_measures_the_branch_not_the_rounded_stream() -> None:
    """A small branch on a large stream: `after - before` would be mostly rounding."""
    model = causal(*[tiny.plain] * 3)
    with torch.no_grad():
        model.embed.weight.mul_(100)
        for layer in model.layers:
            layer.ffn.down.weight.mul_(0.5)
    model.bfloat16().double()  # the weights themselves round alike
    exact = dependency_matrix(model, [token_ids(4, 8)])
    half = dependency_matrix(model.bfloat16(), [token_ids(4, 8)])
    assert torch.allclose(half.ratio, exact.ratio, rtol=0.02)
    assert float((half.cosine - exact.cosine).abs().max()) < 1e-4
    (batch,) = read_batches([token_ids(4, 8)])
    graph = TracedModel(model).graph(batch.inputs)
    block = graph.blocks.ffns[-1]
    run = graph.run(batch.inputs, [block.before, block.after, *block.branches])
    difference = run[block.after].float() - run[block.before].float()
    branch = run[block.branches[0]].float()
    assert float((difference - branch).norm() / branch.norm()) > 0.05


# --- resume -------------------------------------------------------------------------------------------


def stopping(batches: Sequence[Tensor], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Make the measurement of batch `after` fail as Ctrl-C would."""
    import fxfusion.analysis.dependency as module

    original, count = module.measure_batch, 0

    def measure(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(module, "measure_batch", measure)


def test_an_interrupted_measurement_goes_on_to_the_same_bits(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = TracedModel(causal(*[tiny.plain] * 3)), [token_ids(2, 6, seed) for seed in range(4)]
    whole = dependency_matrix(model, batches)
    with monkeypatch.context() as patch:
        stopping(batches, patch, after=2)
        with pytest.raises(KeyboardInterrupt):
            dependency_matrix(model, batches, resume=tmp_path)
    measured = []
    original = measure_batch

    def count(graph: Any, batch: Any, *others: Any) -> Any:
        measured.append(batch.number)
        return original(graph, batch, *others)

    monkeypatch.setattr("fxfusion.analysis.dependency.measure_batch", count)
    resumed = dependency_matrix(model, batches, resume=tmp_path)
    assert measured == [2, 3]
    assert resumed.to_dict() == whole.to_dict()
    assert dependency_matrix(model, batches, resume=tmp_path).to_dict() == whole.to_dict()
    longer = [*batches, token_ids(2, 6, 9)]
    assert dependency_matrix(model, longer, resume=tmp_path).to_dict() == dependency_matrix(model, longer).to_dict()
    assert measured[2:] == [4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", ["weight", "unit", "dropped"])
def test_a_folder_of_another_measurement_is_refused(change: str, tmp_path: Any) -> None:
    model, batches = causal(*[tiny.plain] * 2), [token_ids(seed=1), token_ids(seed=2)]
    traced = TracedModel(model)
    dependency_matrix(traced, batches, resume=tmp_path)
    options: dict[str, Any] = {}
    if change == "weight":
        with torch.no_grad():
            model.layers[1].ffn.down.weight[3, 2] += 1e-9
        expected = "holds another measurement .model is"
    elif change == "unit":
        options, expected = {"unit": "block"}, "unit is ffn, here it is block"
    else:
        options, expected = {"dropped_attention": [0]}, r"dropped_attention is \[\], here it is \[0\]"
    with pytest.raises(OptionError, match=expected):
        dependency_matrix(traced, batches, resume=tmp_path, **options)


# --- bad input ----------------------------------------------------------------------------------------


def test_values_that_are_not_finite_name_block_and_batch() -> None:
    model = causal(*[tiny.plain] * 3)
    bad = token_ids(2, 6, seed=5) * 0 + 7
    good = (token_ids(2, 6, seed=5) % 7).clamp(max=6)
    assert dependency_matrix(model, [good]).values.isfinite().all()
    with torch.no_grad():
        model.embed.weight[7] = math.inf
    with pytest.raises(ValueError, match=r"cosine of layers\.0\.ffn is not finite in batch 1"):
        dependency_matrix(model, [good, bad])


def test_a_block_that_fails_only_without_another_is_named() -> None:
    def fragile(layer: tiny.Layer, x: Tensor) -> Tensor:
        x = x + layer.mix(x)
        return x + layer.ffn(layer.norm(x) * torch.log(x[..., :1]))  # the first channel must be positive

    model = causal(tiny.plain, tiny.plain, fragile)
    with torch.no_grad():
        model.embed.weight[:, 0] = -5.0
        for layer in model.layers:
            layer.ffn.down.weight[0] = 0.0
            layer.mix.out.weight[0] = 0.0
        layer = model.layers[1]
        layer.ffn.down.weight[0] = layer.ffn.down.weight[1]
    ids = token_ids()
    with torch.no_grad():
        sign = layer.ffn(layer.norm(layer.mix(model.layers[0](model.embed(ids))) + model.layers[0](model.embed(ids))))
        layer.ffn.down.weight[0] *= 0.0
        layer.ffn.down.bias = nn.Parameter(torch.zeros(tiny.HIDDEN, dtype=torch.float64))
        layer.ffn.down.bias[0] = 20.0
    assert sign.isfinite().all()
    with pytest.raises(ValueError, match=r"what layers\.2\.ffn adds without layers\.1\.ffn is not finite in batch 0"):
        dependency_matrix(model, [ids])


def test_models_that_cannot_be_measured_are_errors() -> None:
    with pytest.raises(ValueError, match="meta device"):
        dependency_matrix(causal(tiny.plain).to("meta"), [token_ids()])
    with pytest.raises(CaptureError, match="must be captured as one graph"):
        dependency_matrix(causal(tiny.breaking), [token_ids()])
    with pytest.raises(OptionError, match="unit must be one of ffn, block, got 'layer'"):
        dependency_matrix(causal(tiny.plain), [token_ids()], unit="layer")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"no attention to drop in layers \[4\]"):
        dependency_matrix(causal(tiny.plain), [token_ids()], dropped_attention=[4])
    with pytest.raises(ValueError, match='no FFN that could be fused .beside attention.*unit="block"'):
        dependency_matrix(causal(tiny.parallel), [token_ids()])


def test_a_layer_that_runs_twice_is_an_error() -> None:
    model = causal(tiny.plain, tiny.plain)
    model.layers.forward = None

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.inner.embed(input_ids)
            for _ in range(2):
                for layer in self.inner.layers:
                    x = layer(x)
            return self.inner.head(self.inner.norm(x))

    for unit in ("ffn", "block"):
        with pytest.raises(ValueError, match=r"layers \[0, 1\] hold several such blocks, or run several times"):
            dependency_matrix(Looped().eval(), [token_ids()], unit=unit)  # type: ignore[arg-type]


def test_a_block_that_adds_nothing_has_no_length_and_no_direction() -> None:
    model = causal(*[tiny.plain] * 3)
    with torch.no_grad():
        model.layers[1].ffn.down.weight.zero_()
    found = dependency_matrix(model, [token_ids()])
    assert found.ratio[1] == found.contribution_cosine[1] == found.values[0, 1] == found.values[1, 2] == 0
    assert found.cosine[1] == 1 and float(found.values[0, 2]) > 0


def test_one_block_gives_a_matrix_of_zero() -> None:
    found = dependency_matrix(causal(tiny.plain), [token_ids()], progress=True)
    assert torch.equal(found.values, torch.zeros(1, 1)) and float(found.ratio) > 0


def test_progress_goes_to_the_error_stream(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = causal(*[tiny.plain] * 2), [token_ids(), token_ids(seed=2)]
    dependency_matrix(model, batches)
    assert capsys.readouterr() == ("", "")
    dependency_matrix(model, batches, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "dependency matrix (ffn)" in shown.err and "4/4" in shown.err


def test_the_model_is_left_as_it_was() -> None:
    model = causal(*[tiny.plain] * 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dependency_matrix(model, [token_ids()])
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
