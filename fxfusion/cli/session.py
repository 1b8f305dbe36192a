"""What every measuring command does around its own work: read the options, load, print, keep, and stop cleanly.

    @measuring
    def command(run: Session, method: MethodOption = Method.loss) -> dict[str, Any]: ...

is a command with its own options and those of `Common`; what it returns is printed under `--json`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fxfusion.cli.options import Common, check_intact, check_output
from fxfusion.cli.results_folder import ResultsFolder, digest, kind_of
from fxfusion.cli.screen import Screen
from fxfusion.errors import FxFusionError, OptionError
from fxfusion.files import check_apart, check_file

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from fxfusion.models.traced import TracedGraph


_TRACED_TOKENS = 16
Known = Literal["known", "begun", ""]


@dataclass(frozen=True, slots=True)
class Work:
    """A part of what a dry run would do.

    `passes`: forward passes over the whole text, None where they depend on what is found; `known`: what of it is
    kept in the results folder: `"known"` (all), `"begun"` (some) or nothing.
    """

    what: str
    passes: int | None = None
    known: Known = ""


class Session:
    """One run of a command. What is slow to have is made when it is first asked for."""

    def __init__(self, common: Common) -> None:
        self.common = common
        self.screen = Screen(quiet=common.as_json, notes_on_stderr=True)
        self.folder = ResultsFolder(common.results, common.overwrite)
        self.facts: dict[str, Any] = {}  # of the model, every bit of it included; known once it is loaded

    @cached_property
    def device(self) -> torch.device:
        from fxfusion.cli import inputs

        return inputs.pick_device(self.common.device)

    @cached_property
    def dtype(self) -> str:
        """`float32`, ...: what the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def config(self) -> Any:
        from fxfusion.cli import inputs

        return inputs.causal_config(self.common.model_dir)

    @cached_property
    def tokenizer(self) -> Any:
        from fxfusion.cli import inputs

        return inputs.load_tokenizer(self.common.model_dir)

    @cached_property
    def batches(self) -> list[Tensor]:
        """`int64 [batch, length]` each."""
        return self.read_text(self.common.text or ())

    def read_text(self, sources: Sequence[Path]) -> list[Tensor]:
        """The same from other files."""
        common = self.common
        needs_tokenizer = any(source.suffix != ".safetensors" for source in sources)
        with self.screen.busy("reading the text"):
            from fxfusion.cli import inputs  # torch takes seconds: it is part of what is waited for

            inputs.check_length(common.length, self.config)
            found = inputs.read_batches(
                sources,
                self.tokenizer if needs_tokenizer else None,
                length=common.length,
                batch=common.batch,
                sequences=common.sequences,
                seed=common.seed,
                suffixes=common.suffix or (),
            )
        inputs.check_ids(found, self.config)
        return found

    @cached_property
    def tokenizer_if_any(self) -> Any:
        """None where none can be loaded: token ids need none, but texts are nicer to read."""
        try:
            return self.tokenizer
        except FxFusionError:
            return None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The intact model. The results folder is checked to be about it before anything is measured."""
        check_intact(self.common.model_dir)
        with self.screen.busy("loading the model"):
            from fxfusion.cli import inputs

            model = inputs.load_model(self.common.model_dir, self.device, self.common.dtype.value)
        self.folder.make()
        self._check_folder(model)
        return model

    def _check_folder(self, model: PreTrainedModel) -> None:
        from fxfusion.cli.model_layers import describe
        from fxfusion.models.fingerprint import facts_of

        def describe_model() -> dict[str, Any]:
            parameters = sum(weight.numel() for weight in model.parameters())
            return {"name": self.name, "parameters": parameters, "layers": describe(self.graph_without_weights)}

        with self.screen.busy("looking at the weights and layers"):
            self.facts = facts_of(model).model_dump(mode="json")
            self.folder.check_model({**self.facts, "dtype": str(model.dtype).removeprefix("torch.")}, describe_model)

    @property
    def name(self) -> str:
        return self.common.model_dir.resolve().name

    @cached_property
    def graph_without_weights(self) -> TracedGraph:
        """The model's graph from its config alone: which layers have attention, how wide FFNs are."""
        import torch

        from fxfusion.cli import inputs
        from fxfusion.models.traced import TracedModel

        ids = torch.zeros(1, _TRACED_TOKENS, dtype=torch.long, device="meta")
        return TracedModel(inputs.build_without_weights(self.common.model_dir)).graph(ids)

    @cached_property
    def mixers(self) -> list[int]:
        """Layers that have attention."""
        return sorted({block.layer for block in self.graph_without_weights.blocks.mixers})

    @property
    def text_facts(self) -> dict[str, Any]:
        """What was read: where from, how much, and what tells it from other text."""
        rows = [row for batch in self.batches for row in batch.tolist()]
        return {
            "sources": [str(path) for path in self.common.text or ()],
            "sequences": len(rows),
            "length": self.common.length,
            "tokens": sum(map(len, rows)),
            "digest": digest(rows),
        }

    def check_writes(self, *files: str | tuple[Path, str], reads: Sequence[Path | None] = ()) -> None:
        """Raises `OptionError` where a file could not be written, before long work: over what is read, or not ours.
        `files`: those in the results folder by name, others by path and kind. `reads`: beside model and text."""
        known = [self.common.model_dir, *(self.common.text or ()), *(read for read in reads if read is not None)]
        for file in files:
            path, kind = (self.folder.file(file), kind_of(file)) if isinstance(file, str) else file
            check_file(path, kind, overwrite=self.common.overwrite, reads=known)

    def check_output(self, out: Path, *reads: Path | None) -> None:
        """The same for a folder of a model."""
        check_output(out, self.common.overwrite, self.common.model_dir, *(self.common.text or ()), *reads)
        check_apart(out, [self.common.results])

    def require_text(self) -> None:
        """Raises `OptionError` where no text was named, or one that is not there."""
        if not self.common.text:
            raise OptionError("--text: name a text file, a folder of text files, or token ids (.safetensors)")
        for path in self.common.text:
            if not path.exists():
                raise OptionError(f"--text: there is no file or folder {path}")

    def plan_dry_run(self, work: Sequence[Work], writes: Sequence[str | Path]) -> dict[str, Any]:
        """Print what would be done, and return it; nothing is measured or written.

        `writes`: files in the results folder by name, others by path.
        """
        found: dict[str, Any] = {
            "dry_run": True,
            "model": str(self.common.model_dir),
            "layers_with_attention": self.mixers,
            "device": str(self.device),
            "text": self.text_facts if self.common.text else None,
            "work": [{"what": part.what, "passes": part.passes, "known": part.known} for part in work],
            "writes": [str(self.folder.file(name) if isinstance(name, str) else name) for name in writes],
        }
        text = found["text"]
        line = self.screen.line
        line(f"dry run: nothing is measured or written. {len(self.mixers)} layers with attention, on {self.device}")
        if text:
            line(f"text: {text['sequences']} sequences of {text['length']} tokens = {text['tokens']:,} tokens")
        rows = [(part.what, _passes(part), part.known) for part in work]
        self.screen.table(("what", "passes over the text", "in --results"), rows)
        line(f"would write: {', '.join(map(str, found['writes']))}")
        return found


def _passes(part: Work) -> str:
    if part.known == "known":
        return "0"
    return "as needed" if part.passes is None else str(part.passes)


def measuring_with(**defaults: Any) -> Callable[[Callable[..., dict[str, Any]]], Callable[..., None]]:
    """`measuring`, where some options of `Common` have other defaults."""
    return functools.partial(measuring, defaults=defaults)


def measuring(body: Callable[..., dict[str, Any]], defaults: Mapping[str, Any] | None = None) -> Callable[..., None]:
    """A typer command out of `body(run, own options)`: with the options of `Common`, JSON, and a clean stop.

    An own option that is a dataclass stands for its fields.
    """
    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    parts = {p.name: p.annotation for p in own if isinstance(p.annotation, type) and is_dataclass(p.annotation)}

    @functools.wraps(body)
    def command(**given: Any) -> None:
        common = _filled(Common, given)
        given |= {name: _filled(kind, given) for name, kind in parts.items()}
        with stopping_cleanly(f"what was measured is in {common.results}: the same command goes on from there"):
            run = Session(common)
            with stdout_for_json(common.as_json):
                result = body(run, **given)
        if common.as_json:
            print(json.dumps(result, indent=2, allow_nan=False))

    plain = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name not in parts]
    model_dir, *common = _parameters_of(Common, defaults)  # MODEL_DIR stands before other arguments
    merged = [model_dir, *plain, *(p for kind in parts.values() for p in _parameters_of(kind)), *common]
    command.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return command


def _filled(kind: type[Any], given: dict[str, Any]) -> Any:
    """A dataclass from the options that are its fields, which are taken out of what was given."""
    return kind(**{field.name: given.pop(field.name) for field in fields(kind)})


def _parameters_of(kind: type[Any], defaults: Mapping[str, Any] | None = None) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = (defaults or {}).get(field.name, field.default)
        default = inspect.Parameter.empty if default is MISSING else default
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
        )


@contextlib.contextmanager
def stdout_for_json(as_json: bool) -> Iterator[None]:
    """Whatever prints on the way (debug lines, warnings) must not get between the lines of the JSON."""
    import rich

    rich.reconfigure(stderr=True)  # progress bars of the library
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def stopping_cleanly(how_to_go_on: str) -> Iterator[None]:
    """Warnings take one line; Ctrl-C is an error that says how to go on."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            yield
        except KeyboardInterrupt:
            raise FxFusionError(f"interrupted; {how_to_go_on}") from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    first_line = str(message).strip().splitlines()[0]
    print(f"fxfusion: warning: {first_line}", file=sys.stderr)
