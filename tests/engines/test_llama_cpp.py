"""llama.cpp runs the GGUF files that fxfusion writes, and says what the model in memory says. `make engines-full`.

It is built from source into an environment of its own, where fxfusion is not installed; too long for CI.
"""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import fxfusion
from bench.engines import (
    HOISTED,
    LIMIT,
    NEW_TOKENS,
    PROMPTS,
    ROOT,
    Answer,
    Comparison,
    answer_of,
    run_command,
    run_script,
)
from bench.real_model import fetch
from bench.reference import load_model, load_tokenizer
from examples.demo import DROPPED, GROUP, PLAN
from fxfusion.checkpoints.companions import how_to_run
from fxfusion.checkpoints.gguf.load import load_tokenizer as load_gguf_tokenizer
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.checkpoints.nemotron_models import decoder, ids, logits, off
from tests.fxfusion.checkpoints.test_llama_cpp_sentencepiece import TEXTS, tokenizer

pytestmark = pytest.mark.engines_full
WIDE = FusionPlan(groups=[{"members": list(group), "mixers": "wide"} for group in HOISTED.groups])
NAMES = ("intact", "dropped", "hoisted", "wide")


def made(name: str) -> Any:
    if name == "dropped":
        return fxfusion.fuse(fxfusion.drop_attention(load_model(), DROPPED), PLAN)
    return load_model() if name == "intact" else fxfusion.fuse(load_model(), HOISTED if name == "hoisted" else WIDE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file and our answer for each name; `damaged`: that of the dropped one without a member, `q8_0`: quantised."""
    folder, tokenizer = tmp_path_factory.mktemp("llama_cpp"), load_tokenizer()
    for name in NAMES:
        model = made(name)
        fxfusion.save_pretrained(model, folder / f"{name}.gguf", "gguf", tokenizer=tokenizer)
        answer_of(model, tokenizer).write(folder / name)
        if name == "dropped":
            fxfusion.save_pretrained(model, folder / "q8_0.gguf", "gguf", tokenizer=tokenizer, gguf_type="q8_0")
            width = load_model().config.intermediate_size
            with torch.no_grad():
                model.model.layers[GROUP[0]].mlp.down_proj.weight[:, 2 * width : 3 * width] = 0
            fxfusion.save_pretrained(model, folder / "damaged.gguf", "gguf", tokenizer=tokenizer)
    (folder / "request.json").write_text(json.dumps({"prompts": PROMPTS, "new_tokens": NEW_TOKENS}))
    return folder


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, Answer]:
    return asked(root, root / "request.json", (*NAMES, "damaged", "q8_0"))


def asked(root: Path, request: Path, names: tuple[str, ...]) -> dict[str, Answer]:
    scratch = root / f"answers to {request.stem}"
    scratch.mkdir()
    files = [root / f"{name}.gguf" for name in names]
    run_script("llama-cpp", "in_llama_cpp.py", [request, scratch, *files], scratch, timeout=600)
    return {name: Answer.read(scratch / name) for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_gives_our_text_and_our_numbers(name: str, found: dict[str, Answer], root: Path) -> None:
    compared = Comparison.of(found[name], Answer.read(root / name))
    assert compared.same_prompts, "the tokenizer of the file splits the prompts otherwise"
    assert compared.error <= LIMIT
    assert compared.same_tokens and compared.same_text
    assert compared.agrees


def test_a_fused_model_without_one_member_is_rejected(found: dict[str, Answer], root: Path) -> None:
    compared = Comparison.of(found["damaged"], Answer.read(root / "dropped"))
    assert compared.same_prompts
    assert compared.error > 100 * LIMIT
    assert not compared.same_tokens and not compared.agrees


def test_a_quantised_file_is_near(found: dict[str, Answer], root: Path) -> None:
    """By the logits of the prompts, where both read the same tokens."""
    ours, far = Answer.read(root / "dropped"), found["damaged"]
    assert ours.logits is not None and far.logits is not None and found["q8_0"].logits is not None
    for number, prompt in enumerate(ours.prompt_ids):
        near, other = (
            float((one.logits[number] - ours.logits[number])[: len(prompt)].abs().mean())
            for one in (found["q8_0"], far)
            if one.logits is not None
        )
        assert 0 < near < other / 3


_REACH = {"rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
OTHERS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "heads": {"head_dim": 32},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", **_REACH, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **_REACH}},
}


@pytest.mark.filterwarnings("ignore:no tokenizer is written")
def test_biases_heads_and_rotary_embeddings(tmp_path: Path) -> None:
    """Random decoders without attention in the first layer and in another, without a tokenizer."""
    models = {name: fxfusion.drop_attention(decoder(**others), [0, 3]) for name, others in OTHERS.items()}
    for name, model in models.items():
        fxfusion.save_pretrained(model, tmp_path / f"{name}.gguf", "gguf")
    tokens = ids(tokens=100)[:1]
    (tmp_path / "request.json").write_text(json.dumps({"ids": tokens.tolist(), "prompts": [], "new_tokens": 0}))
    for name, answer in asked(tmp_path, tmp_path / "request.json", tuple(models)).items():
        assert answer.logits is not None
        assert off(answer.logits[0], logits(models[name], tokens)[0]) < 1e-4, name


SEVERAL = FusionPlan(
    groups=[
        {"members": [12, 13], "mixers": "hoist"},
        {"members": [18, 19], "mixers": "hoist"},
        {"members": [24, 25], "mixers": "wide"},
    ]
)


def test_a_real_model_at_8_bits(tmp_path: Path) -> None:
    """SmolLM2-135M on eight times 250 tokens of Python's own reference: what rounding costs, in nats."""
    source, names = fetch(), []
    tokenizer = load_gguf_tokenizer(source)
    tokens = tokenizer(" ".join(topics[name] for name in sorted(topics))[:40_000]).input_ids
    rows = [tokens[begin : begin + 250] for begin in range(0, 2000, 250)]
    for form, plan in {"intact": None, "fused": SEVERAL}.items():
        model = fxfusion.from_pretrained(source)
        if plan is not None:
            fxfusion.fuse(model, plan)
        for kind in ("f32", "q8_0", "q4_0"):
            names.append(f"{form}-{kind}")
            fxfusion.save_pretrained(model, tmp_path / f"{names[-1]}.gguf", "gguf", gguf_type=kind, tokenizer=tokenizer)
    (tmp_path / "request.json").write_text(json.dumps({"ids": rows, "prompts": [], "new_tokens": 0}))
    found = asked(tmp_path, tmp_path / "request.json", tuple(names))
    ours = torch.cat([logits(model, torch.tensor([row]))[0] for row in rows])
    theirs = torch.cat([*(found["fused-f32"].logits or [])])
    assert off(theirs, ours) < 1e-3
    losses = {name: loss_of(answer, rows) for name, answer in found.items()}
    costs = {name: loss - losses[f"{name.partition('-')[0]}-f32"] for name, loss in losses.items()}
    print({name: round(cost, 4) for name, cost in costs.items()})
    assert losses["fused-f32"] > losses["intact-f32"] + 0.05, "fusing costs something, which must show here"
    assert abs(costs["fused-q8_0"]) < max(2 * abs(costs["intact-q8_0"]), 0.01), costs
    assert costs["intact-q4_0"] > 0.05 and 0.05 < costs["fused-q4_0"] < 2 * costs["intact-q4_0"], costs


def loss_of(answer: Answer, rows: list[list[int]]) -> float:
    """Nats per token."""
    pairs = zip(answer.logits or [], rows, strict=True)
    return float(torch.stack([cross_entropy(one[:-1], torch.tensor(row[1:])) for one, row in pairs]).mean())


def test_what_a_command_says_runs(root: Path) -> None:
    (root / "words").write_text(how_to_run("gguf", "llama.cpp", root / "hoisted.gguf"))
    said = run_command("llama-cpp", ["python", "words"], root, timeout=100)
    assert "15 runs" in said, said[-2000:]


def test_pieces_of_sentencepiece_cut_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    """Prompts of the reference model in a vocabulary of a few pieces."""
    given = tokenizer()
    model = decoder(vocab_size=len(given))
    fxfusion.save_pretrained(model, tmp_path / "pieces.gguf", "gguf", tokenizer=given)
    (tmp_path / "request.json").write_text(json.dumps({"prompts": TEXTS, "new_tokens": 1}))
    answer = asked(tmp_path, tmp_path / "request.json", ("pieces",))["pieces"]
    assert answer.prompt_ids == [given(text)["input_ids"] for text in TEXTS]


def test_the_documents_name_the_version(found: dict[str, Answer]) -> None:
    documents = (ROOT / "docs" / "engines.md").read_text("utf-8")
    for name, version in (found["intact"].facts or {})["versions"].items():
        assert f"{name} {version}" in documents
