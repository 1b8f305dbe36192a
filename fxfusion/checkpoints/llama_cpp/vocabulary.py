"""The tokenizer of a file: `tokenizer.*` settings, from a tokenizer of transformers or copied from another GGUF file.

Byte-level BPE, only where llama.cpp cuts text by the same rule (`tokenizer.ggml.pre`) as the tokenizer's own pipeline
says, and BPE of SentencePiece (`sentencepiece.py`): what is not understood there is refused by its name.
Source: the regular expressions in src/llama-vocab.cpp of llama.cpp, and set_vocab of its convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf
from fxfusion.checkpoints.llama_cpp import sentencepiece
from fxfusion.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from gguf import GGUFWriter

_NO_TYPE = "a tokenizer that GGUF has no type for"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What stands before the byte level, and whether that cuts by GPT-2's rule: the name of it, by `ignore_merges`.
_RULES: dict[tuple[str, ...], dict[bool, str]] = {
    ("gpt-2",): {False: "gpt-2"},
    ("digits", "gpt-2"): {False: "smollm"},
    (_LLAMA3,): {False: "smaug-bpe", True: "llama-bpe"},
    (_LLAMA3.replace("{1,3}", ""),): {False: "qwen2"},
}
_NORMAL, _CONTROL, _USER, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
_PREFIX = "tokenizer."
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Setting:
    """`kinds`: types of `gguf.GGUFValueType` by name, of an array that of its entries last; None: by the value."""

    name: str
    value: Any
    kinds: tuple[str, ...] | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        import gguf

        kinds = [gguf.GGUFValueType[kind] for kind in self.kinds or ()] or [gguf.GGUFValueType.get_type(self.value)]
        if kinds[0] is gguf.GGUFValueType.ARRAY and not self.value:
            return  # an array without entries says nothing
        inner = kinds[-1] if len(kinds) > 1 else None
        writer.add_key_value(self.name, self.value, kinds[0], inner)


def vocabulary_of(base: str, tokenizer: Any, size: int) -> list[Setting]:
    """Settings for a model with `size` embeddings: of `tokenizer`, one of transformers; without it, of `base`, where
    the model came from. Where that has none, a warning says so, and the file takes token ids alone.

    Raises `CheckpointError` that names what GGUF cannot say of it.
    """
    name = base if tokenizer is None else getattr(tokenizer, "name_or_path", "")
    if isinstance(name, str) and is_gguf(name):
        return _copied(Path(name), size)
    if tokenizer is None:
        tokenizer = _of_base(name)
    if tokenizer is None:
        where = f"{name} has none" if name else "where the model came from is not known"
        warnings.warn(f"no tokenizer is written: none was given, and {where} (tokenizer=...)", stacklevel=4)
        return [Setting("tokenizer.ggml.model", "no_vocab")]
    return _Reader.of(tokenizer, size).settings()


def _of_base(name: str) -> Any:
    from transformers import AutoTokenizer

    is_folder = bool(name) and os.path.isdir(name)
    if not name or (is_folder and not any(Path(name, file).is_file() for file in _FILES)):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each kind of tokenizer fails in its own way
        if not is_folder:  # a name that is not on this machine
            return None
        raise CheckpointError(f"{name}: its tokenizer cannot be loaded: {first_line(error)}") from error


def _copied(path: Path, size: int) -> list[Setting]:
    """Every setting of the tokenizer of a file."""
    from gguf import GGUFReader

    GgufFile.read(path)  # which says what is wrong with it
    found = [
        Setting(name, field.contents(), tuple(kind.name for kind in field.types))
        for name, field in GGUFReader(path).fields.items()
        if name.startswith(_PREFIX)
    ]
    tokens = next((len(one.value) for one in found if one.name == "tokenizer.ggml.tokens"), None)
    if tokens not in (None, size):
        raise CheckpointError(f"{path} has {tokens} tokens, and the model {size} embeddings: another model's file?")
    return found


@dataclass(frozen=True, slots=True)
class _Reader:
    """`pipeline`: the content of its tokenizer.json."""

    tokenizer: Any
    pipeline: Mapping[str, Any]
    size: int

    @classmethod
    def of(cls, tokenizer: Any, size: int) -> _Reader:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise CheckpointError(f"{_NO_TYPE}: {type(tokenizer).__name__} has no tokenizer.json")
        return cls(tokenizer, json.loads(backend.to_str()), size)

    def settings(self) -> list[Setting]:
        self._check_model()
        found = self._of_pieces() if sentencepiece.is_sentencepiece(self.pipeline) else self._of_bytes()
        for role, word in _IDS.items():
            number = getattr(self.tokenizer, f"{role}_token_id", None)
            if number is not None:
                found.append(Setting(f"tokenizer.ggml.{word}_token_id", number, ("UINT32",)))
            elif role == "eos":
                raise CheckpointError(f"{_NO_TYPE}: it has no eos token, and llama.cpp would take number 11 for it")
        found += [Setting(f"tokenizer.ggml.add_{role}_token", added) for role, added in self.added().items()]
        return found + self.templates()

    def _check_model(self) -> None:
        model = self.pipeline["model"]
        if model.get("type") != "BPE":
            raise CheckpointError(f"{_NO_TYPE}: only BPE is written, and it is {model.get('type')}")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise CheckpointError(f"{_NO_TYPE}: {name} = {model[name]!r} of its BPE")

    def _of_bytes(self) -> list[Setting]:
        rule, (tokens, types) = self.rule(), self.tokens()
        return [
            Setting("tokenizer.ggml.model", "gpt2"),
            Setting("tokenizer.ggml.pre", rule),
            Setting("tokenizer.ggml.tokens", tokens),
            Setting("tokenizer.ggml.token_type", types, ("ARRAY", "INT32")),
            # Bytes that are spaces have letters of their own.
            Setting("tokenizer.ggml.merges", [" ".join(pair) for pair in self.merges()]),
        ]

    def _of_pieces(self) -> list[Setting]:
        in_front, (tokens, types) = sentencepiece.space_in_front(self.pipeline), self.tokens()
        added = {one["content"] for one in self.pipeline.get("added_tokens") or []}
        types = sentencepiece.kinds(tokens, types, getattr(self.tokenizer, "unk_token_id", None))
        scores = sentencepiece.scores(tokens, self.merges(), added)
        return [
            Setting("tokenizer.ggml.model", "llama"),
            Setting("tokenizer.ggml.pre", "default"),
            Setting("tokenizer.ggml.tokens", tokens),
            Setting("tokenizer.ggml.scores", scores, ("ARRAY", "FLOAT32")),
            Setting("tokenizer.ggml.token_type", types, ("ARRAY", "INT32")),
            Setting("tokenizer.ggml.add_space_prefix", in_front),
        ]

    def rule(self) -> str:
        """`tokenizer.ggml.pre`."""
        model, normalizer = self.pipeline["model"], self.pipeline.get("normalizer")
        if normalizer not in (None, {"type": "NFC"}):
            raise CheckpointError(f"{_NO_TYPE}: it normalises text by {normalizer.get('type')}")
        steps = tuple(self._steps())
        rules = _RULES.get(steps, {})
        ignores = bool(model.get("ignore_merges"))
        if ignores not in rules:
            how = " and ".join(repr(step) for step in steps)
            more = f", with ignore_merges = {ignores}" if rules else ""
            raise CheckpointError(f"{_NO_TYPE}: llama.cpp has no rule that cuts text by {how}{more}")
        if normalizer is not None:
            warnings.warn("the tokenizer composes characters first (NFC), and llama.cpp does not", stacklevel=6)
        return rules[ignores]

    def _steps(self) -> list[str]:
        """How text is cut, each step in a word that `_RULES` knows or as what it is."""
        given = self.pipeline.get("pre_tokenizer") or {}
        steps = list(given.get("pretokenizers", [given]))
        if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
            raise CheckpointError(f"{_NO_TYPE}: only byte-level BPE without a space in front is written: {given!r}")
        words = []
        for step in steps[:-1]:
            rest = {name: value for name, value in step.items() if name not in ("type", "trim_offsets")}
            if step["type"] == "Digits" and rest == {"individual_digits": True}:
                words.append("digits")
            elif step["type"] == "Split" and rest | {"pattern": 0} == {"pattern": 0, **_ISOLATED}:
                words.append(str(step["pattern"].get("Regex", step["pattern"])))
            else:
                words.append(json.dumps(step))
        return [*words, "gpt-2"] if steps[-1].get("use_regex", True) else words

    def tokens(self) -> tuple[list[str], list[int]]:
        """Texts and types by number; numbers without a token are unused."""
        known: dict[str, int] = {**self.pipeline["model"]["vocab"]}
        added = self.pipeline.get("added_tokens") or []
        for one in added:
            odd = next((name for name in ("lstrip", "rstrip", "single_word") if one.get(name)), None)
            if odd is not None:
                raise CheckpointError(f"{_NO_TYPE}: {odd} of its token {one['content']!r}")
            known[one["content"]] = one["id"]
        last = max(known.values())
        if last >= self.size:
            raise CheckpointError(f"the tokenizer has token {last}, and the model {self.size} embeddings")
        tokens, types = [f"[PAD{number}]" for number in range(self.size)], [_UNUSED] * self.size
        for text, number in known.items():
            tokens[number], types[number] = text, _NORMAL
        for one in added:
            types[one["id"]] = _CONTROL if one.get("special") else _USER
        return tokens, types

    def merges(self) -> list[tuple[str, str]]:
        found = [one.split(" ") if isinstance(one, str) else one for one in self.pipeline["model"]["merges"]]
        return [(left, right) for left, right in found]

    def added(self) -> dict[str, bool]:
        """Whether text gets a token in front (`bos`) or at the end (`eos`)."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        bos, eos = ([getattr(self.tokenizer, f"{role}_token_id", None)] for role in ("bos", "eos"))
        for first in (False, True):
            for last in (False, True):
                if whole == [*(bos if first else ()), *plain, *(eos if last else ())]:
                    return {"bos": first, "eos": last}
        raise CheckpointError(f"{_NO_TYPE}: it puts other tokens than bos and eos around a text: {whole}")

    def templates(self) -> list[Setting]:
        given = getattr(self.tokenizer, "chat_template", None)
        named = {"default": given} if isinstance(given, str) else dict(given or {})
        found = []
        for name, text in named.items():
            found.append(Setting(f"tokenizer.chat_template{'' if name == 'default' else f'.{name}'}", text))
        if names := sorted(named.keys() - {"default"}):
            found.append(Setting("tokenizer.chat_templates", names))
        return found


_ISOLATED = {"behavior": "Isolated", "invert": False}
