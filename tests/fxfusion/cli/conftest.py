"""Tiny model folders, text, and the command line in this process."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fxfusion import cli

VOCABULARY = 40
LAYERS = 3
SMALL = ["--length", 16, "--batch", 4, "--sequences", 8]  # of a text as `make_text` writes it


@dataclass(frozen=True, slots=True)
class Ran:
    """Exit code, standard output and standard error of one command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The last line of stderr, which says what is wrong."""
        lines = self.err.strip().splitlines()
        assert lines and lines[-1].startswith("fxfusion: error: "), self.err
        return lines[-1].removeprefix("fxfusion: error: ")


Run = Callable[..., Ran]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """`run("score", folder, "--greedy")` is what the console command would do."""

    def command(*args: object) -> Ran:
        capfd.readouterr()
        code = call(*args)
        return Ran(code, *capfd.readouterr())

    return command


def call(*args: object) -> int:
    """The exit code of a command line."""
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["fxfusion", *map(str, args)])
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    finally:
        patch.undo()
    return int(stopped.value.code or 0)


def make_model(folder: Path, seed: int = 0, layers: int = LAYERS, **fields: Any) -> Path:
    """A random model whose FFNs and attentions are strong enough to matter, with a tokenizer of numbers as words."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=layers, **{**sizes, **fields})
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else 0.2 * torch.randn_like(weight))
    model.save_pretrained(folder)
    words = {"<eos>": 0, "<unk>": 1, **{str(number): number for number in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    return folder


def make_text(file: Path, words: int = 400, seed: int = 0) -> Path:
    draw = random.Random(seed)
    file.write_text(" ".join(str(draw.randrange(2, VOCABULARY)) for _ in range(words)))
    return file


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def scored(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results folder with scores by loss: not to be changed."""
    results = tmp_path_factory.mktemp("scored") / "results"
    assert call("score", model, "--text", text, "--results", results, *SMALL) == 0
    return results


@pytest.fixture
def results(scored: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(scored, tmp_path / "results"))


@pytest.fixture(scope="session")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored token ids: other rows than those of `text`."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    generator = torch.Generator().manual_seed(3)
    save_file({"input_ids": torch.randint(0, VOCABULARY, (8, 64), generator=generator).to(torch.uint16)}, file)
    return file
