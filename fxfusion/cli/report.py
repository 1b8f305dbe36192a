"""`fxfusion report`: everything that is in the results folder, on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fxfusion.cli.options import AsJson, Overwrite, Results
from fxfusion.cli.results_folder import PAGE, ResultsFolder
from fxfusion.cli.session import stdout_for_json
from fxfusion.errors import FxFusionError
from fxfusion.files import check_file

Out = Annotated[Path | None, typer.Option(help="The page.", show_default="report.html in --results")]
Title = Annotated[str, typer.Option(help="Heading of the page.")]


def command(
    results: Results = Path("fxfusion_results"),
    out: Out = None,
    title: Title = "fxfusion results",
    as_json: AsJson = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML page of all results: layers, dependency, plan, refusals, quality, speed.

    The page needs nothing else: no network, no other file. What was not measured yet is named on it.
    """
    if not results.is_dir():
        raise FxFusionError(f"--results {results}: no such folder; fxfusion score, plan or eval make it")
    page = out or results / PAGE
    known = [path for path in results.iterdir() if path.name != PAGE]
    check_file(page, "results page", overwrite=overwrite, reads=known)
    with stdout_for_json(as_json):
        from fxfusion.cli.collect import collect
        from fxfusion.report.results_page import write_results_page

        found = collect(ResultsFolder(results))
        path = write_results_page(found, page, title, overwrite=overwrite)
    if as_json:
        print(json.dumps({"page": str(path), "results": found.to_dict()}, indent=2, allow_nan=False))
    else:
        print(f"written: {path}")
