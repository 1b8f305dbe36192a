"""`fxfusion simulate`: predictions from tables, configs and plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config

from fxfusion.cost import Hardware, simulate
from fxfusion.plan.fusion_plan import FusionPlan
from tests.fxfusion.cli.conftest import Run

H100 = ["--hardware", "h100", "--tp", "8", "--precision", "fp8", "--batch", "1"]
UNFUSE = ["--unfuse", "125:8", "--unfuse", "134:12", "--unfuse", "143:15", "--unfuse", "149:14"]


def test_a_published_latency_as_json(run: Run) -> None:
    ran = run("simulate", "nemotron-ultra-253b", *H100, *UNFUSE, "--json")
    assert ran.code == 0 and ran.err == ""
    assert ran.json["tokens_per_second"] == pytest.approx(63.38, rel=0.15)
    assert ran.json["latency_ms"] == pytest.approx(1e3 / ran.json["tokens_per_second"])
    assert (ran.json["all_reduces"], ran.json["ffns"]) == (190, 126)
    assert ran.json["bytes_per_gpu"] == sum(ran.json["memory"].values())


def test_groups_are_shown_beside_the_model_as_it_is(run: Run) -> None:
    args = ["simulate", "nemotron-super-49b", *H100, "--groups", "42-50", "--groups", "53-69"]
    ran = run(*args, "--json")
    assert ran.json["before"]["ffns"] - ran.json["ffns"] == 8 + 16
    assert ran.json["latency_ms"] < ran.json["before"]["latency_ms"]
    shown = run(*args, "--price", "2").out
    assert "as it is" in shown and "fused" in shown and "cost of a million tokens" in shown and "x as fast" in shown


def test_windows_are_shown_with_what_they_save(run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    groups = [{"members": [4, 5], "mixers": "hoist"}, {"members": [6, 7, 8], "mixers": "wide"}]
    FusionPlan(groups=groups).save(plan)
    args = ["simulate", "llama-3.3-70b", *H100, "--plan", plan]
    found = run(*args, "--json").json
    assert found["before"]["all_reduces"] - found["all_reduces"] == (4 - 3) + (6 - 2)
    shown = run(*args).out
    assert "window 4-5 (hoist): 3 sublayers instead of 4, 3 all-reduces instead of 4" in shown
    assert "window 6-8 (wide): 2 sublayers instead of 6, 2 all-reduces instead of 6" in shown
    alone = run("simulate", "llama-3.3-70b", "--hardware", "h200", "--plan", plan).out
    assert "window 4-5 (hoist): 3 sublayers instead of 4\n" in alone and "window" not in run(*args[:-2]).out


def test_a_folder_a_plan_and_a_hardware_file(run: Run, model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    FusionPlan(dropped_attention=[1, 2], groups=[[1, 2]]).save(plan)
    device = Hardware.of("cpu").model_copy(update={"name": "mine"}).save(tmp_path / "mine.json")
    ran = run("simulate", model, "--hardware", device, "--precision", "fp32", "--plan", plan, "--json")
    assert ran.code == 0, ran.err
    assert (ran.json["hardware"], ran.json["attentions"], ran.json["ffns"]) == ("mine", 1, 2)
    expected = simulate(model, hardware=device, precision="fp32", plan=plan).to_dict()
    assert {name: ran.json[name] for name in expected} == json.loads(json.dumps(expected))


def test_a_config_that_does_not_say_whether_ffns_are_gated(run: Run, tmp_path: Path) -> None:
    GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=40, n_positions=32).save_pretrained(tmp_path)
    args = ["--hardware", "cpu", "--precision", "fp32", "--json"]
    ran = run("simulate", tmp_path, *args)
    assert ran.code == 0, ran.err
    matrices = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 40 * 64
    assert ran.json["memory"]["weights"] == 4 * (matrices + 5 * 64)  # gates would add a third to the FFNs
    assert run("simulate", tmp_path / "config.json", *args).json["memory"] == ran.json["memory"]


def test_placements(run: Run) -> None:
    args = ["simulate", "nemotron-super-49b", "--placement", "--precision", "bf16"]
    found = run(*args, "--json").json
    assert {row["tp"] for row in found["placements"]} == {1, 2, 4, 8}
    assert found["quickest"]["tp"] == 8 and found["refused"] == {}
    shown = run(*args, "--price", "2").out
    assert "whole runs" in shown and "8 *" in shown and "9, 17" in shown


def test_the_gain_over_sizes_and_batches(run: Run, tmp_path: Path) -> None:
    args = ["simulate", "nemotron-super-49b", "--precision", "fp8", "--sweep", "--output", tmp_path / "gain.csv"]
    ran = run(*args)
    assert ran.code == 0 and "hidden size" in ran.out and f"written: {tmp_path / 'gain.csv'}" in ran.out
    heads = "launch,all_reduce,tp,batch,scale,hidden,before_ms,after_ms,gain\n"
    assert (tmp_path / "gain.csv").read_text().startswith(heads)
    assert all(words in ran.out for words in ("fusing on cuda-graph, fused-norm", "on megakernel", "gains under 2% in"))
    named = run("simulate", "nemotron-super-49b", "--sweep", "--groups", "42-50", "--json").json["points"]
    undone = run("simulate", "nemotron-ultra-253b", "--sweep", "--unfuse", "125:8", "--json").json["points"]
    assert all(point["gain"] > 1 for point in (*named, *undone))
    alone = run("simulate", "nemotron-super-49b", "--sweep", "--launch", "eager", "--json").json["points"]
    assert {(point["launch"], point["all_reduce"]) for point in alone} == {("eager", "plain")}


def test_what_it_runs_on(run: Run) -> None:
    args = ["simulate", "llama-3.3-70b", *H100]
    assert "8 x h100, cuda-graph, all-reduce plain" in run(*args).out
    found = run(*args, "--all-reduce", "fused-norm", "--json").json
    assert (found["launch"], found["all_reduce"]) == ("cuda-graph", "fused-norm")
    plain, eager = (run(*args, *more, "--json").json for more in ((), ("--launch", "eager")))
    assert found["latency_ms"] < plain["latency_ms"] < eager["latency_ms"]


def test_a_file_of_this_machine(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxfusion.cost

    monkeypatch.setattr(fxfusion.cost, "calibrate", lambda device: Hardware.of("cpu"))
    ran = run("simulate", "--calibrate", "--output", tmp_path / "here.json")
    assert ran.code == 0 and "memory bandwidth" in ran.out
    assert Hardware.of(tmp_path / "here.json") == Hardware.of("cpu")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "MODEL: name a layer table, a config.json, a folder with one, or a GGUF file"),
        (["no-such-model"], "no-such-model: no such file or folder with a config.json, and no table of that name"),
        (["llama-3.3-70b", "--hardware", "h1000"], "no device 'h1000'"),
        (["llama-3.3-70b", "--precision", "fp9"], "--precision: expected one of fp4"),
        (["llama-3.3-70b", "--hardware", "cpu", "--launch", "eager"], "launch 'eager': cpu has no eager_latency"),
        (["llama-3.3-70b", "--tp", "3"], "which tp 3 does not divide"),
        (["llama-3.3-70b", "--unfuse", "3"], "--unfuse: expected a layer and a number of members such as 125:8"),
        (["llama-3.3-70b", "--unfuse", "3:2", "--unfuse", "3:4"], "--unfuse: layer 3 is named twice"),
        (["llama-3.3-70b", "--groups", "3"], "group 3-3: it has 1 FFN"),
        (["llama-3.3-70b", "--groups", "3-4"], "the attention of layer 4 lies between its FFNs"),
        (["llama-3.3-70b", "--groups", "a-b"], "--groups: expected layers such as 4-8"),
        (["llama-3.3-70b", "--plan", "gone.yaml"], "gone.yaml: cannot be read"),
        (["llama-3.3-70b", "--price", "-1"], "--price: expected a price above 0"),
        (["llama-3.3-70b", "--sweep"], "Llama-3.3-70B-Instruct has no run of FFNs"),
        (["llama-3.3-70b", "--sweep", "--placement"], "--placement and --sweep were both given"),
        (["llama-3.3-70b", "--output", "x.csv"], "--output: only --sweep and --calibrate write a file"),
        (["nemotron-super-49b", "--sweep", "--output", "x.txt"], "x.txt: expected a name that ends in"),
        (["--calibrate", "--output", "x.txt"], "--calibrate: --output names the file, which ends in .json; got x.txt"),
        (["--calibrate"], "--calibrate: --output names the file, which ends in .json"),
    ],
)
def test_errors_are_one_line(run: Run, args: list[str], message: str) -> None:
    ran = run("simulate", *args)
    assert ran.code == 2 and message in ran.error and len(ran.err.splitlines()) == 1
