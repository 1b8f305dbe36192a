"""`fxfusion check MODEL_DIR`: is a model folder whole, and does it compute what it says?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fxfusion.cli.conversion import Conversion, converting, say_engines
from fxfusion.cli.options import ModelDir, check_folder
from fxfusion.errors import FxFusionError

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be checked; reads no weights.")]


@converting
def command(run: Conversion, model_dir: ModelDir, dry_run: DryRun = False) -> dict[str, Any]:
    """Check a model folder: files, tensors, plan, logits, cache; exit code 1 where something is wrong.

    Nothing of the folder is trusted: no pickle is read and no code of it is run. Of a folder with a plan, the fused
    model is compared with the parallel form of its members. Of a nemotron-nas folder, says which engines load it.
    """
    check_folder(model_dir)
    from fxfusion.cli.checks import checks

    planned, rows = checks(run, model_dir), list[dict[str, Any]]()
    if dry_run:
        run.screen.line(f"would check: {', '.join(check.what for check in planned)}")
        return {"model": str(model_dir), "dry_run": True, "would_check": [check.what for check in planned]}
    for check in planned:
        try:
            good, detail = check.run()
        except FxFusionError as error:
            good, detail = False, str(error).splitlines()[0]
        run.screen.verdict(good, f"{check.what}: {detail}")
        rows.append({"what": check.what, "good": good, "detail": detail})
        if not good:
            break  # what follows needs it
    result = {"model": str(model_dir), "good": all(row["good"] for row in rows), "checks": rows}
    if result["good"]:
        result["engines"] = _engines(run, model_dir)
    if not result["good"]:
        _finish(run, result)
        raise typer.Exit(1)
    return result


def _engines(run: Conversion, model_dir: Path) -> dict[str, str | None] | None:
    from fxfusion.checkpoints.nemotron_nas.export import engines_that_load
    from fxfusion.checkpoints.nemotron_nas.load import MODEL_TYPE
    from fxfusion.checkpoints.reading import SafeFolder

    config = SafeFolder.of(model_dir).json("config.json")
    if config.get("model_type") != MODEL_TYPE:
        return None
    engines = engines_that_load(config)
    say_engines(run.screen, engines)
    return engines


def _finish(run: Conversion, result: dict[str, Any]) -> None:
    """The document of a folder that is not good: its exit code leaves no other way to print it."""
    import json
    import sys

    if run.as_json:
        print(json.dumps(result, indent=2), file=sys.__stdout__)
