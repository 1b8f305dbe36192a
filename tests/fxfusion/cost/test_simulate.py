"""One simulated step: its numbers by hand, what must grow with what, and what cannot be asked."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxfusion.cost import Hardware, LayerTable, Simulation, simulate
from fxfusion.cost.layer_table import Layer
from fxfusion.cost.timing import Seconds, Timed
from fxfusion.errors import OptionError, PlanError
from fxfusion.plan.fusion_plan import FusionPlan
from fxfusion.plan.groups import PlannedGroup

H100 = Hardware.of("h100")


def table(widths: str = "A512 512 512 A512", **fields: Any) -> LayerTable:
    layers = []
    for word in widths.split():
        width = word.strip("A-")
        layers.append(Layer(has_mixer="A" in word, ffn_width=int(width) if width else None))
    given = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 1024} | fields
    return LayerTable(name="small", hidden_size=256, layers=tuple(layers), **given)


# --- numbers ------------------------------------------------------------------------------------------


def test_a_step_by_hand() -> None:
    """One FFN and the lm head on an imaginary device: every term of the sum."""
    device = Hardware(
        name="made up",
        memory=1e9,
        memory_bandwidth=2e6,
        bandwidth_fraction=0.5,
        flops={"bf16": 1e9},
        compute_fraction=0.5,
        processors=4,
        kernel_latency=1e-3,
        gemm_floor=0.0,
        price=3.6,
    )
    found = simulate(table("512", vocab_size=1000), hardware=device, precision="bf16")
    hidden, width, vocabulary, rate = 256 * 2, 512 * 2, 1000 * 2, 1e6
    up = 256 * 2 * width + hidden + 2 * width
    down = 512 * hidden + width + hidden
    head = 256 * vocabulary + hidden + vocabulary
    moved = 3 * hidden + up + 3 * width + down + 3 * hidden + head
    assert found.kernels == 6
    assert found.seconds.bandwidth == pytest.approx(moved / rate, rel=1e-9)
    assert found.seconds == Seconds(bandwidth=found.seconds.bandwidth, launch=pytest.approx(6e-3))
    assert found.tokens_per_second == pytest.approx(1 / (moved / rate + 6e-3))
    assert found.cost_per_million_tokens == pytest.approx(3.6 / 3600 / found.tokens_per_second * 1e6)
    weights = 3 * 512 * hidden + hidden + hidden + 2 * 256 * vocabulary
    assert found.bytes.weights == weights
    assert found.bytes.cache == 0 and found.fits_in_memory


def test_large_batches_are_bound_by_arithmetic_in_whole_waves() -> None:
    large = LayerTable.published("llama-3.3-70b")
    found = simulate(large, tp=8, batch=4096, context=16)
    assert found.seconds.compute > found.seconds.bandwidth
    more = simulate(large, tp=8, batch=4097, context=16)  # one row more is one row of tiles more
    assert more.seconds.compute > 1.01 * found.seconds.compute


def test_one_token_on_a_processor_without_tiles_is_bound_by_memory() -> None:
    table = LayerTable.published("llama-3.3-70b")
    found = simulate(table, hardware="cpu", precision="fp32").seconds
    assert found.bandwidth > 10 * found.compute
    tiled = Hardware.of("cpu").model_copy(update={"tiled": True})
    assert simulate(table, hardware=tiled, precision="fp32").seconds.compute > found.bandwidth


def test_prefill_counts_its_prompts() -> None:
    found = simulate(table(), phase="prefill", batch=2, context=100)
    assert found.work.tokens == 200
    assert found.tokens_per_second == pytest.approx(200 / found.seconds.total)
    assert found.tokens_per_second_per_user == pytest.approx(found.tokens_per_second / 2)


def test_tensor_parallelism_counts_one_all_reduce_for_each_sublayer() -> None:
    alone, shared = simulate(table()), simulate(table(), tp=8)
    assert (alone.all_reduces, shared.all_reduces) == (0, 6)
    assert (alone.seconds.all_reduce, alone.attentions, alone.ffns) == (0.0, 2, 4)
    assert simulate(table(), tp=8, groups=[range(1, 3)]).all_reduces == 5
    assert simulate("nemotron-ultra-253b", tp=8).all_reduces == 64 + 81


def test_norms_that_are_part_of_all_reduces_cost_their_bytes() -> None:
    """Each sublayer's norm but the first, and the one before the head, lose their kernel; nothing else changes."""
    plain, merged = simulate(table(), tp=8), simulate(table(), tp=8, all_reduce="fused-norm")
    assert (plain.kernels - merged.kernels, merged.all_reduces) == (6, plain.all_reduces)
    assert plain.seconds.launch - merged.seconds.launch == pytest.approx(6 * H100.kernel_latency)
    assert plain.seconds.bandwidth == pytest.approx(merged.seconds.bandwidth)
    alone = simulate(table(), all_reduce="fused-norm")
    assert alone.seconds == simulate(table()).seconds  # nothing to be part of
    many = {"tp": 8, "batch": 16384}  # a ring, into which nothing can be merged
    assert simulate(table(), **many, all_reduce="fused-norm").seconds == simulate(table(), **many).seconds


def test_without_a_graph_the_host_may_be_what_takes_longer() -> None:
    graph, eager = simulate(table(), tp=8), simulate(table(), tp=8, launch="eager")
    assert eager.seconds.total == pytest.approx((graph.kernels + 6) * (H100.eager_latency or 0))
    assert eager.seconds.total > graph.seconds.total
    large = {"batch": 4096, "context": 16}
    busy = simulate("llama-3.3-70b", launch="eager", **large)
    assert busy.seconds == simulate("llama-3.3-70b", **large).seconds  # the device is


def test_one_kernel_waits_once_for_each_gemm_and_attention() -> None:
    graph, one = simulate(table("A512"), tp=8), simulate(table("A512"), tp=8, launch="megakernel")
    assert (one.kernels, one.all_reduces) == (1, 2)
    waits = len(("qkv", "attention", "out", "gate and up", "down", "lm head"))
    assert one.seconds.launch == pytest.approx(waits * (H100.megakernel_latency or 0))
    assert (one.seconds.bandwidth, one.seconds.all_reduce) == (graph.seconds.bandwidth, graph.seconds.all_reduce)
    merged = simulate(table("A512"), tp=8, launch="megakernel", all_reduce="fused-norm")
    assert merged.seconds == one.seconds  # a norm has no kernel of its own anyway


def test_key_value_heads_are_copied_where_there_are_too_few() -> None:
    few = table(num_key_value_heads=2)
    assert simulate(few, tp=8).bytes.cache == simulate(few, tp=2).bytes.cache
    assert simulate(few, tp=2).bytes.cache == simulate(few, tp=1).bytes.cache / 2


def test_windows_bound_the_cache() -> None:
    near = table("A512").model_copy(update={"layers": (Layer(has_mixer=True, ffn_width=512, window=100),)})
    far = table("A512")
    assert simulate(near, context=1000).bytes.cache == simulate(far, context=100).bytes.cache
    assert simulate(near, context=1000).latency_ms < simulate(far, context=1000).latency_ms
    assert simulate(near, context=50) == simulate(far, context=50)


def test_what_a_window_of_layers_saves() -> None:
    both = table("A512 A512")
    separate = simulate(both, tp=8)
    hoisted = simulate(both, tp=8, groups=[PlannedGroup((0, 1), "hoist")])
    wide = simulate(both, tp=8, groups=[PlannedGroup((0, 1), "wide")])
    assert (separate.all_reduces, hoisted.all_reduces, wide.all_reduces) == (4, 3, 2)
    assert separate.latency_ms > hoisted.latency_ms > wide.latency_ms
    assert separate.bytes.cache == hoisted.bytes.cache == wide.bytes.cache


@pytest.mark.parametrize(("mixers", "expected"), [("hoist", 2 * 3), ("wide", 2 * 2)])
def test_all_reduces_of_a_plan_with_windows(mixers: str, expected: int) -> None:
    """n attentions and one FFN where they are hoisted, one and one where they are wide, 2n without a window."""
    layers = [Layer(has_mixer=True, ffn_width=512, window=100 if number == 1 else None) for number in range(5)]
    model = table("A512").model_copy(update={"layers": tuple(layers)})
    plan = FusionPlan(groups=[{"members": window, "mixers": mixers} for window in ([0, 1], [2, 3])])
    before, found = simulate(model, tp=2), simulate(model, tp=2, plan=plan)
    assert before.all_reduces == 2 * 5 and before.windows == ()
    assert found.all_reduces == expected + 2
    shown = found.to_dict()["windows"]
    assert [(one["layers"], one["mixers"]) for one in shown] == [([0, 1], mixers), ([2, 3], mixers)]
    assert [one["all_reduces_before"] - one["all_reduces"] for one in shown] == [(8 - expected) // 2] * 2
    alone = simulate(model, plan=plan)
    assert alone.all_reduces == 0 and {one["all_reduces"] for one in alone.to_dict()["windows"]} == {0}
    assert found.seconds.all_reduce < before.seconds.all_reduce
    assert (found.bytes.cache, before.bytes.cache) == (before.bytes.cache, before.bytes.cache)


def test_it_can_be_printed_as_json() -> None:
    found = simulate(table(), hardware="h200", tp=2, precision="fp8", price=2.0).to_dict()
    assert json.loads(json.dumps(found)) == found
    wanted = ("tokens_per_second", "latency_ms", "bytes_per_gpu", "all_reduces", "cost_per_million_tokens", "quality")
    assert set(wanted) < set(found)
    assert sum(found["breakdown_ms"].values()) == pytest.approx(found["latency_ms"])
    assert sum(found["memory"].values()) == pytest.approx(found["bytes_per_gpu"], abs=2)


def test_memory_of_a_published_model() -> None:
    whole = simulate("llama-3.1-405b", precision="bf16", tp=1)
    assert whole.bytes.weights == pytest.approx(2 * 405.85e9, rel=1e-3)
    assert not simulate("llama-3.1-405b", precision="bf16", tp=8).fits_in_memory
    assert simulate("llama-3.1-405b", precision="fp8", tp=8).fits_in_memory


# --- what must grow with what -------------------------------------------------------------------------

WORK = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4, 8]),
        "precision": st.sampled_from(["fp8", "bf16"]),
        "batch": st.integers(1, 3000),
        "context": st.integers(1, 5000),
        "phase": st.sampled_from(["decode", "prefill"]),
    }
)
WIDTHS = st.lists(st.sampled_from(["A512", "1024", "A", "A64", "256", "16", "-"]), min_size=1, max_size=8).map(" ".join)


def seconds(widths: str, work: dict[str, Any], device: Hardware = H100, **options: Any) -> float:
    return simulate(table(widths), hardware=device, **(work | options)).seconds.total


@settings(deadline=None, max_examples=60)
@given(widths=WIDTHS, work=WORK, factor=st.floats(1.0, 10.0))
def test_a_better_device_is_never_slower(widths: str, work: dict[str, Any], factor: float) -> None:
    before = seconds(widths, work)
    for name in ("memory_bandwidth", "kernel_latency", "gemm_floor"):
        value = getattr(H100, name)
        better = value * factor if name == "memory_bandwidth" else value / factor
        assert seconds(widths, work, H100.model_copy(update={name: better})) <= before * (1 + 1e-12)
    faster = H100.model_copy(update={"flops": {kind: rate * factor for kind, rate in H100.flops.items()}})
    assert seconds(widths, work, faster) <= before * (1 + 1e-12)


@settings(deadline=None, max_examples=60)
@given(widths=WIDTHS, work=WORK, more=st.integers(1, 2000))
def test_more_tokens_are_never_quicker(widths: str, work: dict[str, Any], more: int) -> None:
    before = seconds(widths, work)
    assert seconds(widths, work | {"batch": work["batch"] + more}) >= before * (1 - 1e-12)
    assert seconds(widths, work | {"context": work["context"] + more}) >= before * (1 - 1e-12)


@settings(deadline=None, max_examples=60)
@given(widths=WIDTHS, work=WORK)
def test_more_devices_hold_less_and_compute_less_each(widths: str, work: dict[str, Any]) -> None:
    found = [simulate(table(widths), hardware=H100, **(work | {"tp": tp})) for tp in (1, 2, 4, 8)]
    alone = [one.seconds.total - one.seconds.all_reduce for one in found]
    sizes = [one.bytes_per_gpu for one in found]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(alone))
    assert sizes == sorted(sizes, reverse=True)
    talk = [one.seconds.all_reduce for one in found]
    assert talk[0] == 0 and talk == sorted(talk)


@settings(deadline=None, max_examples=60)
@given(work=WORK, widths=st.lists(st.sampled_from([16, 64, 512, 1024]), min_size=2, max_size=8))
def test_fusing_is_never_slower(work: dict[str, Any], widths: list[int]) -> None:
    words = "A512 " + " ".join(map(str, widths))
    before = simulate(table(words), hardware=H100, **work)
    after = simulate(table(words), hardware=H100, groups=[range(1, len(widths) + 1)], **work)
    assert after.seconds.total < before.seconds.total
    assert after.ffns == 2 and before.ffns == 1 + len(widths)
    assert after.bytes.weights == pytest.approx(before.bytes.weights - 2 * 256 * (len(widths) - 1))  # its norms


def test_times_add_up() -> None:
    one = Timed(Seconds(1.0, 2.0, 3.0, 4.0), 5, 6)
    assert one + one == one * 2 and one.seconds.total == 10.0


# --- what cannot be asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "h1000"}, "no device 'h1000'"),
        ({"precision": "fp9"}, "precision: expected one of fp4, fp8"),
        ({"hardware": "a100", "precision": "fp8"}, "precision 'fp8': a100 computes in"),
        ({"kv_precision": "fp9"}, "kv_precision: expected one of"),
        ({"batch": 0}, "batch: expected a whole number from 1 on, got 0"),
        ({"context": -1}, "context: expected a whole number from 0 on, got -1"),
        ({"context": 0, "phase": "prefill"}, "context: expected a whole number from 1 on, got 0"),
        ({"phase": "training"}, "phase: expected decode or prefill, got 'training'"),
        ({"launch": "fast"}, "launch: expected cuda-graph or eager or megakernel, got 'fast'"),
        ({"all_reduce": "fused"}, "all_reduce: expected plain or fused-norm, got 'fused'"),
        ({"tp": 3}, "the attention of layer 0 has 16 heads, which tp 3 does not divide"),
        ({"tp": 16}, "tp 16: the link of h100 joins 8 devices"),
        ({"tp": True}, "tp: expected a whole number"),
        ({"hardware": "cpu", "tp": 2}, "tp 2: cpu has no link"),
        ({"price": -1.0}, "price: expected a price above 0, got -1.0"),
        ({"groups": [(2, 3)]}, "group 2-3: the attention of layer 3 lies between its FFNs"),
        ({"groups": [(2, 9)]}, "layer 9 does not exist: small has 4 layers"),
        ({"unfuse": {1: 1000}}, "unfuse: layer 1: expected 1 to 512 members"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        simulate(table(), **options)


def test_more_errors() -> None:
    with pytest.raises(OptionError, match="the FFN of layer 0 has 509 channels, which tp 2 does not divide"):
        simulate(table("509"), tp=2)
    with pytest.raises(OptionError, match="has 3 key-value heads, and tp 4 is no multiple of them"):
        simulate(table("A4", num_attention_heads=12, num_key_value_heads=3), tp=4)
    with pytest.raises(OptionError, match="has 6 key-value heads, which tp 4 does not divide"):
        simulate(table("A4", num_attention_heads=12, num_key_value_heads=6), tp=4)
    with pytest.raises(PlanError, match="plan: expected a FusionPlan"):
        simulate(table(), plan="no such plan")


def test_plans() -> None:
    plan = FusionPlan(dropped_attention=[3], groups=[[1, 2, 3]])
    found: Simulation = simulate(table(), plan=plan)
    assert (found.attentions, found.ffns) == (1, 2)
    assert found == simulate(table(), plan={"dropped_attention": [3], "groups": [[1, 2, 3]]})
