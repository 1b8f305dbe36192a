"""What every command does around its own work: read the options, load, print, keep, and stop cleanly.

    @command
    def score(run: Session, method: MethodOption = Method.loss) -> dict[str, Any]: ...

is a typer command with its own options and those of `Session`; what it returns is printed under `--json`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints, overload

import typer
from typer.models import ArgumentInfo

from fxfusion.cli import options
from fxfusion.cli.options import DType, check_model
from fxfusion.cli.results_folder import PLANS, ResultsFolder, contents, digest, kind_of
from fxfusion.cli.screen import Screen
from fxfusion.errors import FxFusionError, OptionError, PlanError
from fxfusion.files import check_apart, check_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from fxfusion.models.traced import TracedGraph
    from fxfusion.plan.fusion_plan import FusionPlan


_TRACED_TOKENS = 16
Body = Callable[..., dict[str, Any]]
Known = Literal["known", "begun", ""]


# --- one run of a command -----------------------------------------------------------------------------


@dataclass(kw_only=True)
class Run:
    """The options of every command. `exit_code`: what it ends with when its result is printed."""

    as_json: options.AsJson = False
    overwrite: options.Overwrite = False
    exit_code: int = field(default=0, init=False)

    @cached_property
    def screen(self) -> Screen:
        return Screen(quiet=self.as_json, notes_on_stderr=True)

    @property
    def stopped(self) -> str:
        """What is said after Ctrl-C."""
        return "nothing was written"

    def tell_read(self, path: Path, dtype: object = None) -> None:
        """Say what a GGUF file is, and what its weights were read as; folders have files that say it."""
        from fxfusion.checkpoints.gguf.header import GgufFile, is_gguf

        if is_gguf(path):
            self.screen.note(f"read {GgufFile.read(path).told(dtype)}")


@dataclass(kw_only=True)
class Conversion(Run):
    """The options of a command that reads a model, and what it does with it."""

    model_dir: options.ModelDir
    device: options.Device = "cpu"
    dtype: options.StoredDType = DType.auto
    dry_run: options.DryRun = False

    @property
    def stopped(self) -> str:
        return "no folder was changed"

    def load(self, folder: Path | None = None, *, fused: bool = True) -> Any:
        """The model of a folder or file; without `fused`, its plan drops attention and fuses nothing."""
        path = folder or self.model_dir
        check_model(path)
        with self.screen.busy(f"loading {path}"):
            from fxfusion.checkpoints.api import from_pretrained
            from fxfusion.cli.inputs import pick_device

            dtype = None if self.dtype is DType.auto else self.dtype.value
            device = pick_device(self.device)
        loud = self.screen.notes.is_terminal
        model = from_pretrained(path, dtype=dtype, device=device, fused=fused, progress=loud)
        self.tell_read(path, model.dtype)
        return model


@dataclass(frozen=True, slots=True)
class Work:
    """A part of what a dry run would do.

    `passes`: forward passes over the whole text, None where they depend on what is found; `known`: what of it is
    kept in the results folder: `"known"` (all), `"begun"` (some) or nothing.
    """

    what: str
    passes: int | None = None
    known: Known = ""


@dataclass(kw_only=True)
class Session(Run):
    """The options of a command that measures a model on text. What is slow to have is made when it is first asked for.

    `facts`: of the model, every bit of it included; known once it is loaded.
    """

    model_dir: options.ModelDir
    text: options.Text = None
    suffix: options.Suffix = None
    length: options.Length = 256
    batch: options.Batch = 8
    sequences: options.Sequences = 32
    device: options.Device = "auto"
    dtype: options.DTypeOption = DType.auto
    seed: options.Seed = 0
    results: options.Results = Path("fxfusion_results")
    dry_run: options.DryRun = False
    facts: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def stopped(self) -> str:
        return f"what was measured is in {self.results}: the same command goes on from there"

    @cached_property
    def folder(self) -> ResultsFolder:
        return ResultsFolder(self.results, self.overwrite)

    @cached_property
    def torch_device(self) -> torch.device:
        from fxfusion.cli import inputs

        return inputs.pick_device(self.device)

    @cached_property
    def dtype_name(self) -> str:
        """`float32`, ...: what the model computes in."""
        return str(self.model.dtype).removeprefix("torch.")

    @cached_property
    def config(self) -> Any:
        from fxfusion.cli import inputs

        return inputs.causal_config(self.model_dir)

    @cached_property
    def tokenizer(self) -> Any:
        from fxfusion.cli import inputs

        return inputs.load_tokenizer(self.model_dir)

    @cached_property
    def tokenizer_if_any(self) -> Any:
        """None where none can be loaded: token ids need none, but texts are nicer to read."""
        try:
            return self.tokenizer
        except FxFusionError:
            return None

    @cached_property
    def batches(self) -> list[Tensor]:
        """`int64 [batch, length]` each."""
        return self.read_text(self.text or ())

    def read_text(self, sources: Sequence[Path]) -> list[Tensor]:
        """The same from other files."""
        needs_tokenizer = any(source.suffix != ".safetensors" for source in sources)
        with self.screen.busy("reading the text"):
            from fxfusion.cli import inputs  # torch takes seconds: it is part of what is waited for

            inputs.check_length(self.length, self.config)
            found = inputs.read_batches(
                sources,
                self.tokenizer if needs_tokenizer else None,
                length=self.length,
                batch=self.batch,
                sequences=self.sequences,
                seed=self.seed,
                suffixes=self.suffix or (),
            )
        inputs.check_ids(found, self.config)
        return found

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model as its folder says, fused where that was. The results folder is checked to be about it first."""
        with self.screen.busy("loading the model"):
            from fxfusion.cli import inputs

            model = inputs.load_model(self.model_dir, self.torch_device, self.dtype.value)
        self.tell_read(self.model_dir, model.dtype)
        self.folder.make()
        self._check_folder(model)
        if self.changes is not None and self.changes.groups:
            self.screen.note("(layers are numbered as they stand in the fused model)")
        return model

    def _check_folder(self, model: PreTrainedModel) -> None:
        from fxfusion.cli.inputs import describe
        from fxfusion.models.fingerprint import facts_of

        def describe_model() -> dict[str, Any]:
            parameters = sum(weight.numel() for weight in model.parameters())
            return {"name": self.name, "parameters": parameters, "layers": describe(self.graph_without_weights)}

        with self.screen.busy("looking at the weights and layers"):
            self.facts = facts_of(model).model_dump(mode="json")
            if self.changes is not None:
                self.facts["changed"] = contents(self.changes)
            self.folder.check_model({**self.facts, "dtype": str(model.dtype).removeprefix("torch.")}, describe_model)

    @cached_property
    def changes(self) -> FusionPlan | None:
        """What was done to the model already, by the plan in its folder; None where nothing was."""
        from fxfusion.cli import inputs

        return inputs.changes_of(self.model_dir)

    @property
    def name(self) -> str:
        return self.model_dir.resolve().name

    @cached_property
    def graph_without_weights(self) -> TracedGraph:
        """The model's graph from its config alone: which layers have attention, how wide FFNs are."""
        from fxfusion.cli.inputs import graph_without_weights

        return graph_without_weights(self.model_dir, _TRACED_TOKENS)[1]

    @cached_property
    def mixers(self) -> list[int]:
        """Layers that have attention."""
        return sorted({block.layer for block in self.graph_without_weights.blocks.mixers})

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.graph_without_weights.blocks.layers)

    @property
    def text_facts(self) -> dict[str, Any]:
        """What was read: where from, how much, and what tells it from other text."""
        rows = [row for batch in self.batches for row in batch.tolist()]
        return {
            "sources": [str(path) for path in self.text or ()],
            "sequences": len(rows),
            "length": self.length,
            "tokens": sum(map(len, rows)),
            "digest": digest(rows),
        }

    def check(
        self,
        *writes: str | tuple[Path, str],
        output: Path | None = None,
        reads: Sequence[Path] = (),
        intact: bool = False,
        layout: Callable[[], None] = lambda: None,
    ) -> None:
        """Before long work: the model's folder and the text are there, and what is written may be.

        `writes`: files in the results folder by name, others by path and kind. `output`: a model's folder. `reads`:
        what is read beside model and text. `intact`: nothing may have been done to the model yet. `layout`: checks
        the form that is to be written. The text is read last, so that too little of it is known before the model is
        loaded. Raises `OptionError`: over what is read, or over what
        is not ours.
        """
        check_model(self.model_dir)
        if not self.text:
            raise OptionError("--text: name a text file, a folder of text files, or token ids (.safetensors)")
        for path in self.text:
            if not path.exists():
                raise OptionError(f"--text: there is no file or folder {path}")
        known = [self.model_dir, *self.text, *reads]
        for file in writes:
            path, kind = (self.folder.file(file), kind_of(file)) if isinstance(file, str) else file
            check_file(path, kind, overwrite=self.overwrite, reads=known)
        if output is not None:
            options.check_output(output, self.overwrite, *known)
            check_apart(output, [self.results])
        if intact:
            from fxfusion.cli import inputs

            inputs.check_intact(self.model_dir)
        layout()
        self._say_little_text()

    def _say_little_text(self) -> None:
        """Raises `OptionError` where there is not one batch; says where there is less than `--sequences` asks for."""
        rows, wanted = sum(map(len, self.batches)), self.sequences - self.sequences % min(self.batch, self.sequences)
        if rows < wanted:
            warnings.warn(
                f"--text holds {rows} sequences of {self.length} tokens, fewer than the {wanted} that are asked for "
                "(--sequences): give more text, or ask for less",
                stacklevel=2,
            )

    # --- dry runs -----------------------------------------------------------------------------------------

    def plan_dry_run(self, work: Sequence[Work], writes: Sequence[str | Path]) -> dict[str, Any]:
        """Print what would be done, and return it; nothing is measured or written.

        `writes`: files in the results folder by name, others by path.
        """
        found: dict[str, Any] = {
            "dry_run": True,
            "model": str(self.model_dir),
            "layers_with_attention": self.mixers,
            "device": str(self.torch_device),
            "text": self.text_facts if self.text else None,
            "work": [{"what": part.what, "passes": part.passes, "known": part.known} for part in work],
            "writes": [str(self.folder.file(name) if isinstance(name, str) else name) for name in writes],
        }
        text = found["text"]
        line = self.screen.line
        line(f"dry run: nothing is measured or written. {len(self.mixers)} layers with attention, on {found['device']}")
        if text:
            line(f"text: {text['sequences']} sequences of {text['length']} tokens = {text['tokens']:,} tokens")
        rows = [(part.what, _passes(part), part.known) for part in work]
        self.screen.table(("what", "passes over the text", "in --results"), rows)
        line(f"would write: {', '.join(map(str, found['writes']))}")
        return found

    def tried_work(self) -> Work:
        """The measurements of whole plans."""
        known = len((self.folder.read(PLANS) or {}).get("plans", {}))
        return Work(f"quality of the plans that are tried ({known} are measured)", None, "begun" if known else "")


def _passes(part: Work) -> str:
    if part.known == "known":
        return "0"
    return "as needed" if part.passes is None else str(part.passes)


# --- a function as a command --------------------------------------------------------------------------


@overload
def command(body: Body) -> Callable[..., None]: ...
@overload
def command(**defaults: Any) -> Callable[[Body], Callable[..., None]]: ...
def command(body: Body | None = None, **defaults: Any) -> Any:
    """A typer command out of `body(run, own options)`: with the options of the run's class, JSON, and a clean stop.

    A parameter whose type is a dataclass, such as the run itself, stands for its fields. `defaults`: where they are
    others than the fields'.
    """
    if body is None:
        return functools.partial(command, **defaults)
    first, *own = inspect.signature(body, eval_str=True).parameters.values()
    parts = {p.name: p.annotation for p in own if isinstance(p.annotation, type) and is_dataclass(p.annotation)}
    kinds = [*parts.values(), first.annotation]

    @functools.wraps(body)
    def wrapped(**given: Any) -> None:
        run = _filled(first.annotation, given)
        with _stopping_cleanly(run.stopped), _stdout_for_json(run.as_json), _naming_options(names):
            result = body(run, **{name: _filled(kind, given) for name, kind in parts.items()}, **given)
        if run.as_json:
            print(json.dumps(result, indent=2, allow_nan=False))
        if run.exit_code:
            raise typer.Exit(run.exit_code)

    merged = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p.name not in parts]
    merged += [p for kind in kinds for p in _parameters_of(kind, defaults)]
    names = {p.name: _option_of(p) for p in merged}
    wrapped.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return wrapped


def _filled(kind: type[Any], given: dict[str, Any]) -> Any:
    """A dataclass from the options that are its fields, which are taken out of what was given."""
    return kind(**{each.name: given.pop(each.name) for each in fields(kind) if each.init})


def _parameters_of(kind: type[Any], defaults: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    last = {each.name for each in fields(Run)}  # they stand last in the help of every command
    for each in sorted(fields(kind), key=lambda each: each.name in last):
        if each.init:
            default = defaults.get(each.name, each.default)
            yield inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=hints[each.name],
            )


def _option_of(parameter: inspect.Parameter) -> str:
    """`--drop-attention` of a parameter `drop_attention`, `MODEL` of an argument."""
    found = next(iter(getattr(parameter.annotation, "__metadata__", ())), None)
    if isinstance(found, ArgumentInfo):
        return str(found.metavar)
    declared = [name for name in getattr(found, "param_decls", None) or () if name.startswith("--")]
    return declared[0].split("/")[0] if declared else f"--{parameter.name.replace('_', '-')}"


_ALONE = r"(?<![\w/.-])"  # not part of a longer name, or of a path
# Where the argument of a function has another name than the option.
_OTHER_NAMES = {
    "dropped_attention": "drop_attention",
    "suffixes": "suffix",
    "batches": "text",
    "context": "length",
    "cache": "results",
    "max_new_tokens": "new_tokens",
}


@contextlib.contextmanager
def _naming_options(names: Mapping[str, str]) -> Iterator[None]:
    """Functions name their arguments in what they refuse; on a command line these are options."""
    try:
        yield
    except (OptionError, PlanError) as error:
        known = {**names} | {name: names[other] for name, other in _OTHER_NAMES.items() if other in names}
        error.args = (in_options(str(error), known), *error.args[1:])
        raise


def in_options(text: str, names: Mapping[str, str]) -> str:
    """`"max_kl: ... method='loss'"` -> `"--max-kl: ... --method loss"`; a plain word stays one inside of a sentence."""
    for name, option in names.items():
        text = re.sub(rf"{_ALONE}{name}=True\b", option, text)
        text = re.sub(rf"{_ALONE}{name}=(['\"]?)([\w.]+)\1", rf"{option} \2", text)
        text = re.sub(rf"{_ALONE}{name}=(?!\w)", option, text)
        text = re.sub(rf"^{name}(?=:| and )", option, text)
        if "_" in name:
            text = re.sub(rf"{_ALONE}{name}\b(?!/)", option, text)
    return text


@contextlib.contextmanager
def _stdout_for_json(as_json: bool) -> Iterator[None]:
    """Whatever prints on the way (debug lines, warnings) must not get between the lines of the JSON."""
    import rich

    rich.reconfigure(stderr=True)  # progress bars of the library
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _stopping_cleanly(how_to_go_on: str) -> Iterator[None]:
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
