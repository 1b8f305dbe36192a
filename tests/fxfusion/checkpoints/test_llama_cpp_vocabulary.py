"""Tokenizers in the words of GGUF, read back by the package `gguf`, and those that it has no type for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fxfusion
from bench.reference import load_tokenizer
from fxfusion.checkpoints.llama_cpp.vocabulary import _LLAMA3, Setting, vocabulary_of
from fxfusion.errors import CheckpointError
from tests.fxfusion.checkpoints import gguf_eager
from tests.fxfusion.checkpoints.gguf_models import TOKENS, write_gguf

_LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def tokenizer(cut: Any = _GPT2, **more: Any) -> PreTrainedTokenizerFast:
    """Bytes, one merge, `<s>` and `</s>`, and a word of the user's."""
    vocab = {text: number for number, text in enumerate([*_LETTERS, "Ġa"])}
    inner = Tokenizer(models.BPE(vocab, [("Ġ", "a")], **more))
    inner.pre_tokenizer = cut
    found = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    found.add_tokens(["<word>"])
    return found


def settings(given: Any, size: int = 300) -> dict[str, Any]:
    return {one.name.removeprefix("tokenizer.ggml."): one.value for one in vocabulary_of("", given, size)}


def split(rule: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), _BYTES])


@pytest.mark.parametrize(
    ("cut", "more", "name"),
    [
        (_GPT2, {}, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]), {}, "smollm"),
        (split(_LLAMA3), {"ignore_merges": True}, "llama-bpe"),
        (split(_LLAMA3), {}, "smaug-bpe"),
        (split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), {}, "qwen2"),
    ],
)
def test_the_rule_that_cuts_text(cut: Any, more: dict[str, Any], name: str) -> None:
    assert settings(tokenizer(cut, **more))["pre"] == name


def test_tokens_and_their_kinds() -> None:
    found = settings(tokenizer())
    size = len(_LETTERS)
    assert found["model"] == "gpt2" and found["tokens"][size : size + 5] == ["Ġa", "<s>", "</s>", "<word>", "[PAD260]"]
    assert found["token_type"][size : size + 5] == [1, 3, 3, 4, 5] and len(found["tokens"]) == 300
    assert found["merges"] == ["Ġ a"]
    assert (found["bos_token_id"], found["eos_token_id"]) == (size + 1, size + 2)
    assert found["add_bos_token"] is False and found["add_eos_token"] is False


def test_what_stands_around_a_text() -> None:
    given = tokenizer()
    front = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", given.bos_token_id)])
    given.backend_tokenizer.post_processor = front
    assert settings(given)["add_bos_token"] is True
    twice = processors.TemplateProcessing(single="<s> <s> $A", special_tokens=[("<s>", given.bos_token_id)])
    given.backend_tokenizer.post_processor = twice
    with pytest.raises(CheckpointError, match="other tokens than bos and eos around a text"):
        settings(given)


def test_chat_templates() -> None:
    given = tokenizer()
    given.chat_template = "{{ messages }}"
    assert settings(given)["tokenizer.chat_template"] == "{{ messages }}"
    given.chat_template = {"default": "a", "tools": "b"}
    found = settings(given)
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tools"]) == ("a", "b")
    assert found["tokenizer.chat_templates"] == ["tools"]


def _unigram() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", -1.0)], None)), eos_token="a")


def _normalised() -> Any:
    given = tokenizer()
    given.backend_tokenizer.normalizer = normalizers.Lowercase()
    return given


def _stripping() -> Any:
    from tokenizers import AddedToken

    given = tokenizer()
    given.add_tokens([AddedToken("<gap>", lstrip=True)])
    return given


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_unigram, "only BPE is written, and it is Unigram"),
        (lambda: tokenizer(byte_fallback=True), "its BPE has no piece <0x00>"),
        (lambda: tokenizer(dropout=0.1), "dropout = 0.1"),
        (_normalised, "it normalises text by Lowercase"),
        (_stripping, "lstrip of its token '<gap>'"),
        (lambda: tokenizer(pre_tokenizers.Whitespace()), "only byte-level BPE without a space in front"),
        (lambda: tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "without a space in front"),
        (lambda: tokenizer(split(r"\p{N}+")), r"no rule that cuts text by '\\\\p\{N\}\+'"),
        (lambda: tokenizer(_GPT2, ignore_merges=True), "cuts text by 'gpt-2', with ignore_merges = True"),
    ],
)
def test_tokenizers_without_a_type(make: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=f"a tokenizer that GGUF has no type for: .*{why}"):
        settings(make())


def test_more_tokens_than_embeddings() -> None:
    with pytest.raises(CheckpointError, match=r"the tokenizer has token 259, and the model 200 embeddings"):
        settings(tokenizer(), 200)


def test_none_is_said() -> None:
    with pytest.warns(UserWarning, match=r"no tokenizer is written: none was given, and where the model came from"):
        assert vocabulary_of("", None, 10) == [Setting("tokenizer.ggml.model", "no_vocab")]


def test_that_of_the_folder_is_taken_and_reads_back(tmp_path: Path) -> None:
    load_tokenizer().save_pretrained(tmp_path / "folder")
    found = {one.name: one.value for one in vocabulary_of(str(tmp_path / "folder"), None, 4096)}
    pipeline = json.loads((tmp_path / "folder" / "tokenizer.json").read_text("utf-8"))
    ids = {text: number for number, text in enumerate(found["tokenizer.ggml.tokens"])}
    assert {text: ids[text] for text in pipeline["model"]["vocab"]} == pipeline["model"]["vocab"]
    assert len(found["tokenizer.ggml.merges"]) == len(pipeline["model"]["merges"])


@pytest.mark.slow
def test_every_setting_of_the_file_that_a_model_came_from_is_copied(tmp_path: Path) -> None:
    write_gguf(tmp_path / "from.gguf")
    model = fxfusion.from_pretrained(tmp_path / "from.gguf")
    fxfusion.drop_attention(model, [1])
    fxfusion.save_pretrained(model, tmp_path / "to.gguf", format="gguf")
    before, after = (gguf_eager.contents(tmp_path / f"{name}.gguf")[0] for name in ("from", "to"))
    copied = {name: value for name, value in before.items() if name.startswith("tokenizer.")}
    assert copied and len(copied["tokenizer.ggml.tokens"]) == len(TOKENS)
    assert {name: after.get(name) for name in copied} == copied
    assert after["general.architecture"] == "deci"
    with pytest.raises(CheckpointError, match="another model's file"):
        vocabulary_of(str(tmp_path / "from.gguf"), None, 7)


@pytest.mark.slow
def test_an_intact_file_is_read_again_by_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "from.gguf")
    fxfusion.save_pretrained(fxfusion.from_pretrained(tmp_path / "from.gguf"), tmp_path / "to.gguf", format="gguf")
    one, other = (fxfusion.from_pretrained(tmp_path / f"{name}.gguf").state_dict() for name in ("from", "to"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="to.gguf")
    assert read.convert_tokens_to_ids(TOKENS) == [*range(len(TOKENS))]
