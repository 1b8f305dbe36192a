from __future__ import annotations

from pathlib import Path

import pytest

from fxfusion.cli import rehearsal
from fxfusion.cli.options import Format
from fxfusion.cli.rehearsal import rehearse
from fxfusion.errors import OptionError
from tests.fxfusion.cli.conftest import LAYERS

MIXERS = list(range(LAYERS))


def test_what_would_be_written_is_read_again_without_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rehearse(model, Format.canonical, ["drop", "hoist", "wide"], MIXERS, LAYERS)
    size = (model / "model.safetensors").stat().st_size
    assert list(found) == ["drop", "hoist", "wide"] and all(0.9 * size < one <= size for one in found.values())
    engines = rehearse(model, Format.nemotron_nas, ["drop", "hoist"], MIXERS, LAYERS)
    assert list(engines) == ["drop", "hoist"] and engines["drop"] < engines["hoist"]

    build = rehearsal.empty_decoder

    def other(config: object) -> object:
        config.hidden_size *= 2  # type: ignore[attr-defined]
        return build(config)  # type: ignore[arg-type]

    monkeypatch.setattr(rehearsal, "empty_decoder", other)
    with pytest.raises(OptionError, match="--format nemotron-nas: what --roads hoist makes .* would be read as"):
        rehearse(model, Format.nemotron_nas, ["hoist"], MIXERS, LAYERS)


def test_a_road_that_a_format_cannot_hold_is_named(model: Path) -> None:
    with pytest.raises(OptionError, match="--format nemotron-nas: what --roads wide makes cannot be written so"):
        rehearse(model, Format.nemotron_nas, ["hoist", "wide"], MIXERS, LAYERS)


def test_a_model_of_fewer_layers_is_read_again_as_a_plain_one(model: Path) -> None:
    size = (model / "model.safetensors").stat().st_size
    assert rehearse(model, Format.canonical, ["remove"], MIXERS, LAYERS)["remove"] < 0.9 * size
