from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxfusion.analysis.batches import (
    IGNORED,
    as_inputs,
    logits_of,
    measuring,
    model_device,
    read_batches,
    require_causal,
    run_model,
    split_targets,
)
from fxfusion.analysis.dependency import dependency_matrix
from fxfusion.analysis.meter import PlanMeter
from fxfusion.analysis.scores import attention_scores
from fxfusion.errors import CaptureError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.planning.make_plan import make_plan
from fxfusion.planning.sweep import sweep
from tests.fxfusion.recovery.own_text import model_of, own_text

IDS = torch.arange(1, 11).view(2, 5)


def test_as_inputs_copies_the_dict() -> None:
    batch = {"input_ids": IDS}
    inputs = as_inputs(batch, 0)
    inputs["more"] = 1
    assert batch.keys() == {"input_ids"}
    with pytest.raises(TypeError, match="batch 3 must be a tensor"):
        as_inputs("text", 3)


def test_a_token_counts_if_it_and_the_one_before_are_real_and_its_label_says_so() -> None:
    labels, mask = IDS.clone(), torch.ones(2, 5)
    labels[0, 4] = IGNORED
    mask[1, :2] = 0
    targets, inputs = split_targets({"input_ids": IDS, "labels": labels, "attention_mask": mask}, 0)
    assert targets.tolist() == [[1, 2, 3, 4, IGNORED], [IGNORED, IGNORED, IGNORED, 9, 10]]
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert split_targets({"input_ids": IDS}, 0)[0] is IDS


def test_only_lone_ids_go_by_position() -> None:
    def model(*args: Any, **kwargs: Any) -> tuple[int, list[str]]:
        return len(args), sorted(kwargs)

    assert run_model(model, {"input_ids": IDS}) == (1, [])
    inputs = {"input_ids": IDS, "attention_mask": IDS, "use_cache": False}
    assert run_model(model, inputs) == (0, sorted(inputs))


def test_tensors_move_to_the_models_device_and_the_rest_stays() -> None:
    def model(**inputs: Any) -> dict[str, Any]:
        return inputs

    moved = run_model(model, {"input_ids": IDS, "use_cache": False}, torch.device("meta"))
    assert moved["input_ids"].is_meta and moved["use_cache"] is False and not IDS.is_meta


def test_the_device_is_that_of_the_weights() -> None:
    assert model_device(nn.Linear(1, 1)) == torch.device("cpu")
    assert model_device(nn.ReLU()) is None and model_device(lambda x: x) is None
    with pytest.raises(ValueError, match="the other is on the meta device"):
        model_device(nn.Linear(1, 1, device="meta"), "the other")


def test_a_model_that_is_not_causal_is_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(**sizes, intermediate_size=8))
    both = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    for model in (masked, both):
        with pytest.raises(ValueError, match=f"{type(model).__name__}. is not a causal language model"):
            model_device(model)


def bert(is_decoder: bool, dtype: torch.dtype, spread: float = 0.1) -> Any:
    """Loaded as a causal language model either way: only its logits tell, by little if the weights are small."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, initializer_range=spread, is_decoder=is_decoder, use_cache=False)
    return BertLMHeadModel(config).eval().to(dtype)


@pytest.mark.parametrize(("dtype", "spread"), [(torch.float64, 0.02), (torch.float32, 0.02), (torch.bfloat16, 0.5)])
def test_tokens_that_see_later_ones_are_noticed(dtype: torch.dtype, spread: float) -> None:
    ids = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(0))
    ids[0, 7] = 0  # the changed token is one that the model knows
    require_causal(bert(True, dtype, spread), ids)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal .its logits change with later tokens"):
        require_causal(bert(False, dtype, spread), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_what_is_measured_must_be_causal() -> None:
    model, batches = bert(False, torch.float32), [torch.randint(11, (3, 12))]
    measures: list[Callable[[], object]] = [
        lambda: attention_scores(model, batches),
        lambda: dependency_matrix(model, batches, unit="block"),
        lambda: PlanMeter(model, batches).quality(FusionPlan()),
    ]
    for measure in measures:
        with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
            measure()


def test_what_is_not_finite_is_no_sign_of_the_future() -> None:
    model = bert(True, torch.float32)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    require_causal(model, torch.ones(1, 9, dtype=torch.int64))


def test_logits_must_fit_the_ids() -> None:
    logits = torch.zeros(2, 5, 7)
    assert logits_of((logits, 1), IDS.shape, 0) is logits
    with pytest.raises(ValueError, match=r"that the student gave for batch 4 must be .* got \[2, 4, 7\]"):
        logits_of(logits[:, 1:], IDS.shape, 4, "the student")


def test_modes_and_gradients_come_back_after_an_error() -> None:
    inner = nn.Dropout()
    model = nn.Sequential(inner.eval(), nn.Dropout()).train()
    inner.eval()

    def inside() -> Tensor:
        with measuring(model, model, None, lambda x: x):
            assert not model.training and not torch.is_grad_enabled()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        inside()
    assert model.training and not inner.training and model[1].training and torch.is_grad_enabled()


ROWS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])


def test_a_tensor_counts_everywhere() -> None:
    first, second = read_batches(iter([ROWS, {"input_ids": ROWS[:1], "position_ids": ROWS[:1]}]))
    assert (first.number, second.number) == (0, 1)
    assert first.inputs == {"input_ids": ROWS} and set(second.inputs) == {"input_ids", "position_ids"}
    assert first.seen.all() and first.seen.shape == (2, 4)
    assert torch.equal(first.targets, ROWS[:, 1:]) and first.counted.all() and first.counted.shape == (2, 3)


def test_padding_and_labels_say_what_counts() -> None:
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
    (batch,) = read_batches([{"input_ids": ROWS, "attention_mask": mask, "labels": labels}])
    assert "labels" not in batch.inputs and "attention_mask" in batch.inputs
    assert batch.seen.tolist() == [[False, True, False, True], [True, True, True, False]]
    # The prediction at a token counts if the next one does, and neither is padding.
    assert batch.counted.tolist() == [[False, False, True], [True, True, False]]


def test_the_digest_tells_all_inputs_apart() -> None:
    variants: list[Any] = [
        ROWS,
        ROWS.flip(0),
        ROWS.int(),
        ROWS.reshape(1, 8),
        {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)},
        {"input_ids": ROWS, "labels": ROWS},
        {"input_ids": ROWS, "flag": True},
        {"input_ids": ROWS, "flag": False},
    ]
    keys = [batch.key for batch in read_batches(variants)]
    assert len(set(keys)) == len(keys)
    assert keys == [batch.key for batch in read_batches(variants)]
    assert read_batches([{"input_ids": ROWS.clone()}])[0].key == keys[0]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches is empty"),
        pytest.param(iter([]), ValueError, "used up only once", id="used-up"),
        (ROWS, TypeError, "wrap a single batch in a list"),
        ([ROWS, ROWS[0]], ValueError, r"batch 1 must hold integer `input_ids` \[batch, seq\], got torch.int64 \[4\]"),
        ([ROWS.float()], ValueError, "got torch.float32"),
        ([{"labels": ROWS}], ValueError, "got NoneType"),
        ([ROWS[:, :1]], ValueError, r"batch 0 is \[2, 1\]: it takes a sequence of at least two tokens"),
        ([ROWS[:0]], ValueError, r"batch 0 is \[0, 4\]"),
        ([{"input_ids": ROWS, "labels": ROWS[:, 1:]}], ValueError, r"labels of batch 0 are \[2, 3\], its ids \[2, 4\]"),
        ([{"input_ids": ROWS, "attention_mask": ROWS[:1]}], ValueError, "attention_mask of batch 0"),
        ([{"input_ids": ROWS, "attention_mask": ROWS * 0}], ValueError, "no token counts"),
        (["text"], TypeError, "batch 0 must be a tensor"),
    ],
    ids=str,
)
def test_bad_batches_are_errors(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        read_batches(batches)


@pytest.mark.parametrize("part", ["", "model.layers.2.mlp"])
def test_an_offloaded_model_is_refused_by_the_weight_that_is_not_there(part: str) -> None:
    """Weights on the meta device until their module is called, as accelerate's hooks keep them."""
    import accelerate

    model, batches = model_of(), own_text(batches=2)
    accelerate.cpu_offload(model.get_submodule(part), torch.device("cpu"))
    measures: list[Callable[[], Any]] = [
        lambda: attention_scores(model, batches),
        lambda: dependency_matrix(model, batches),
        lambda: make_plan(model, batches, drop=1),
        lambda: make_plan(model, batches, roads=["hoist"], target_depth=3),
        lambda: sweep(model, batches),
    ]
    words = r"weights are not there \(model\..*weight is on the meta device: offloaded\?\); load it whole"
    for measure in measures:
        with pytest.raises((CaptureError, ValueError), match=words):
            measure()
