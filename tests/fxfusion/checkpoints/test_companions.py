"""Tokenizer and licence files go with the model; a missing tokenizer is named, not an error."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.reference import MODEL_FOLDER, load_tokenizer
from fxfusion.checkpoints.companions import Companions
from fxfusion.errors import CheckpointError


def model_from(name: object) -> Any:
    return SimpleNamespace(name_or_path=str(name))


def saved(companions: Companions, folder: Path) -> set[str]:
    folder.mkdir()
    companions.save_pretrained(folder)
    return {path.name for path in folder.iterdir()}


def test_files_of_the_models_own_folder_are_taken(tmp_path: Path) -> None:
    names = saved(Companions.of(model_from(MODEL_FOLDER)), tmp_path / "m")
    assert names == {"tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (MODEL_FOLDER / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_is_given_is_saved_and_the_licence_still_comes_along(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("LICENSE", "NOTICE.txt", "tokenizer.json", "modeling_x.py", "pytorch_model.bin"):
        (base / name).write_text("old")
    names = saved(Companions.of(model_from(base), load_tokenizer()), tmp_path / "m")
    assert names == {"LICENSE", "NOTICE.txt", "tokenizer.json", "tokenizer_config.json"}
    assert (tmp_path / "m" / "tokenizer.json").read_text() != "old"


@pytest.mark.parametrize("name", ["", "nobody/has-this-model"])
def test_a_missing_tokenizer_is_named(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match=f"no tokenizer is saved: none was given, and ({name}|where)"):
        assert saved(Companions.of(model_from(name)), tmp_path / "m") == set()


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=f"{tmp_path} has none"):
        Companions.of(model_from(tmp_path))


def test_links_out_of_the_base_folder_are_not_followed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "secret").write_text("x")
    (base / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        saved(Companions.of(model_from(base)), tmp_path / "m")


def test_errors_of_a_tokenizer_are_told(tmp_path: Path) -> None:
    class Broken:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def save_pretrained(self, folder: Path) -> None:
            raise self.error

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for error, kind in ((RuntimeError("odd"), CheckpointError), (OSError(28, "full"), OSError)):
            with pytest.raises(kind, match="odd|full"):
                Companions.of(model_from(""), Broken(error)).save_pretrained(tmp_path)
