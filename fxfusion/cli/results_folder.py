"""The folder where commands keep what they measured, and find it again. A file in it is whole, or what it was before.

| file | made by |
|---|---|
| `model.json` | every command: which model the folder is about, and its layers |
| `scores.json` | `score`, `plan`, `sweep`: the single measurements behind scores, to go on from |
| `scores_<method>.json`, `scores_<method>_greedy.json` | `score`: the scores |
| `matrix_*/` | `matrix` (with heat maps), `plan`, `sweep`: sums to go on from, and the matrix |
| `plans.json` | `plan`, `sweep`: the quality of every plan that was tried |
| `roads/`, `roads_after_refit/` | `plan --roads`, `auto`: the loss of windows alone, and of whole plans |
| `plan.yaml` | `plan`, `auto` |
| `compiled.json` | `plan`, `eval`: what the compiler found and refused |
| `quality.json` | `eval` |
| `sweep.json`, `sweep.csv`, `sweep.svg` | `sweep` |
| `comparison.json`, `comparison.csv`, `comparison.svg`, `comparison/` | `compare`: with all that it measured |
| `report.html` | `report` |
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxfusion.errors import FxFusionError
from fxfusion.files import replacing

if TYPE_CHECKING:
    from fxfusion.plan.fusion_plan import FusionPlan

MODEL, PLAN, COMPILED, QUALITY = "model.json", "plan.yaml", "compiled.json", "quality.json"
SWEEP, SWEEP_TABLE, SWEEP_PLOT, PAGE = "sweep.json", "sweep.csv", "sweep.svg", "report.html"
COMPARISON, COMPARISON_TABLE, COMPARISON_PLOT = "comparison.json", "comparison.csv", "comparison.svg"
_KINDS = {
    COMPARISON_TABLE: "comparison",
    COMPARISON_PLOT: "comparison",
    PLAN: "plan",
    SWEEP_TABLE: "sweep",
    SWEEP_PLOT: "sweep",
    PAGE: "results page",
}
PLANS, MEASURED, MATRIX_FACTS = "plans.json", "scores.json", "matrix.json"


class ResultsFolder:
    """Paths and JSON files in one folder. The folder itself is made by the first write."""

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.overwrite = path, overwrite

    def file(self, name: str) -> Path:
        return self.path / name

    def scores(self, method: str, greedy: bool = False) -> str:
        """Name of the file with finished scores."""
        return f"scores_{method}{'_greedy' if greedy else ''}.json"

    def matrix(self, unit: str, dropped: Sequence[int]) -> Path:
        """A folder; that of the FFNs is the one where `make_plan` looks for it."""
        layers = "_".join(map(str, sorted(dropped)))
        return self.file(f"matrix_{layers}" if unit == "ffn" else f"matrix_{unit}_{layers}".rstrip("_"))

    def make(self) -> None:
        """Raises `FxFusionError` where the folder cannot be made, before anything is measured in vain."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FxFusionError(f"--results {self.path}: cannot be made: {error.strerror or error}") from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise FxFusionError(f"--results {self.path}: no permission to write into it")

    def write(self, name: str, data: Mapping[str, Any]) -> Path:
        """Raises `FxFusionError` where it cannot be written; the old file is then still there."""
        text = json.dumps(data, indent=1, allow_nan=False) + "\n"
        with replacing(self.file(name), kind_of(name), overwrite=self.overwrite, error=FxFusionError) as beside:
            beside.write_text(text, encoding="utf-8")
        return self.file(name)

    def read(self, name: str) -> dict[str, Any] | None:
        """None where there is no such file. Raises `FxFusionError` where it is broken."""
        path = self.file(name)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise FxFusionError(f"{path}: cannot be read: {error.strerror or error}") from error
        except ValueError as error:  # no JSON, or no UTF-8
            raise broken(path, str(error)) from error
        if not isinstance(found, dict):
            raise broken(path, f"it holds a {type(found).__name__}")
        return found

    def check_model(self, facts: Mapping[str, Any], describe: Callable[[], Mapping[str, Any]]) -> None:
        """Note which model, in which precision, the folder is about, and what `describe` adds to that.

        Raises `FxFusionError` where the folder is about another one.
        """
        known = self.read(MODEL)
        if known is None:
            self.write(MODEL, {"facts": dict(facts), **describe()})
        elif known.get("facts") != dict(facts):
            raise FxFusionError(
                f"{self.path} holds results of another model or precision ({known.get('name')},"
                f" {known.get('facts', {}).get('dtype')}); give another folder by --results"
            )

    def attention_layers(self) -> list[int]:
        """The layers that have attention, of the model that the folder is about; none where it knows no model."""
        layers = (self.read(MODEL) or {}).get("layers", [])
        return [layer["number"] for layer in layers if layer["has_mixer"]]


def kind_of(name: str) -> str:
    """What a file in the folder is, for `fxfusion.files`."""
    return _KINDS.get(name, "file of results")


def broken(path: Path, why: str) -> FxFusionError:
    return FxFusionError(f"{path} is broken ({why}): remove it, and run the command again")


def digest(value: Any) -> str:
    """What tells one thing measured from another: 16 hexadecimal digits of its JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def contents(plan: FusionPlan) -> dict[str, Any]:
    """What a plan does, without the record of how it was made."""
    fields = plan.to_dict()
    return {name: fields.get(name) for name in ("groups", "dropped_attention", "norm")} | (
        {"removed": fields["removed"]} if plan.removed else {}
    )
