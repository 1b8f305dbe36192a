"""Who saves a changed model by transformers alone is told what works; what that writes is not taken for the model."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfusion
from fxfusion.cli.inputs import load_config
from fxfusion.errors import FxFusionError, SurgeryError
from tests.fxfusion.checkpoints.models import dropped, fused, intact, logits

ADVICE = r"transformers alone will not load this folder .*fxfusion.save_pretrained\(model, folder\)"


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("made", [dropped, fused])
@pytest.mark.parametrize("how", [lambda model: model, copy.deepcopy, pickled], ids=["itself", "copy", "pickled"])
def test_a_plain_save_warns_and_its_advice_works(made: Any, how: Any, tmp_path: Path) -> None:
    model = how(made())
    with pytest.warns(UserWarning, match=ADVICE):
        model.save_pretrained(tmp_path / "plain")
    for load in (fxfusion.from_pretrained, load_config):
        with pytest.raises(FxFusionError, match=r"changed by fxfusion and then saved without it.*fxfusion.save_pretr"):
            load(tmp_path / "plain")
    fxfusion.save_pretrained(model, tmp_path / "own")
    assert torch.allclose(logits(fxfusion.from_pretrained(tmp_path / "own")), logits(model), atol=1e-5)


def test_a_copy_saves_itself_and_not_the_model_that_it_was_copied_from(tmp_path: Path) -> None:
    model = dropped()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    with pytest.warns(UserWarning, match=ADVICE):
        other.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"].any()


def test_intact_and_unfused_models_say_nothing(tmp_path: Path) -> None:
    model = fxfusion.unfuse(fxfusion.fuse(intact(), {"groups": [{"members": [1, 2], "mixers": "hoist"}]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "a")
        intact().save_pretrained(tmp_path / "b")
    assert logits(fxfusion.from_pretrained(tmp_path / "a")).shape == logits(model).shape


def test_a_failure_leaves_nothing_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = intact()

    def fail(*_: Any) -> None:
        raise SurgeryError("stopped")

    monkeypatch.setattr("fxfusion.models.ffn_surgery.fuse._Surgery.run", fail)
    with pytest.raises(SurgeryError, match="stopped"):
        fxfusion.fuse(model, {"dropped_attention": [1, 2, 3], "groups": [[1, 2, 3]]})
    assert "save_pretrained" not in vars(model)
