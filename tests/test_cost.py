"""The cost model: vLLM's cache layout, its scheduler, and what work takes, on cases that can be counted by hand."""

import json

import numpy as np
import pytest

from layerboost.artifacts import Load, Plan, load, save
from layerboost.cost import Counts, Measured, calibrate, predict, schedule, step_seconds
from layerboost.cost.device import Device, find_device, known_device
from layerboost.cost.schedule import Step
from layerboost.cost.work import work_of
from layerboost.errors import DataError, PlanError, UsageError
from layerboost.model.shapes import SHAPES, Shape, mixed_plan, named_plan, shape_config
from layerboost.vllm.kv import good_block_size, kv_layout
from tests.tiny import FULL, NONE, linear, make_model, window


def layout_of(plan, block_size=16, layer_bytes=10, native=None):
    return kv_layout(plan, native or [None] * len(plan), layer_bytes, block_size)


@pytest.mark.parametrize(
    ("plan", "layers_per_group", "windows"),
    [
        ([FULL] * 4, 4, [None]),
        ([window(8)] * 4, 4, [8]),
        ([FULL, NONE, NONE, FULL], 2, [None]),
        ([FULL] * 2 + [window(8)] * 4, 2, [None, 8, 8]),
        ([FULL] * 8 + [window(8)] * 4, 4, [None, None, 8]),
        ([FULL] * 5 + [window(8)] * 6, 6, [None, 8]),  # nearly as many: padded to the larger number
        ([FULL] * 5 + [window(8)] * 8, 5, [None, 8, 8]),
        ([FULL, window(8), window(32), window(32)], 1, [None, 8, 32, 32]),
    ],
)
def test_groups_are_equally_large(plan, layers_per_group, windows):
    layout = layout_of(plan)
    assert layout.block_bytes == layers_per_group * 16 * 10
    assert sorted(layout.windows, key=str) == sorted(windows, key=str)
    with_cache = sum(layer.mixer != "no_attention" for layer in plan)
    assert layout.used_share == pytest.approx(with_cache / (layers_per_group * len(windows)))


def test_native_windows_count_where_the_plan_keeps_the_layer():
    assert layout_of([FULL, FULL], native=[9, None]).windows == (9, None)


def test_plans_that_vllm_cannot_run_have_no_layout():
    with pytest.raises(PlanError, match="layer 1: linear_attention"):
        layout_of([FULL, linear("gla")])
    with pytest.raises(PlanError, match="no layer has attention"):
        layout_of([NONE, NONE])


@pytest.mark.parametrize("blocks", range(18, 28))
def test_a_schedule_ends_or_is_refused(blocks):
    """Where the prompt goes in by parts, taking a request in asks for more blocks (23) than its work holds (19)."""
    layout = layout_of([FULL] + [window(4)] * 4)
    load = load_of(concurrency=2, prompt=103, output=5)
    if blocks - 1 >= 23:
        assert sum(step.sampled for step in schedule(layout, blocks, load, 32)) == 10
    else:
        with pytest.raises(DataError, match="give it more memory"):
            schedule(layout, blocks, load, 32)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 64])
@pytest.mark.parametrize("block", [1, 16, 32])
def test_a_sequence_holds_the_blocks_that_its_windows_reach(size, block):
    layout = layout_of([window(size)], block)
    for computed in (0, 1, size - 1, size, size + 1, 200):
        for new in (1, 40):
            # written out: every block with a token that one of the new queries sees, or that is new
            first_query = computed
            seen = range(max(0, first_query - size + 1), computed + new)
            assert layout.blocks(computed, computed + new) == len({token // block for token in seen})


def test_blocks_fit_the_narrowest_window():
    for plan, size in (
        ([FULL, NONE], 128), ([FULL, window(64)], 32), ([window(1024), window(130)], 64), ([window(1024)], 128),
        ([window(4)], 32),
    ):  # fmt: skip
        assert good_block_size(plan, on_cpu=True) == size
        assert good_block_size(plan, on_cpu=False) == 16


def load_of(concurrency=4, prompt=20, output=5, requests=None):
    return Load(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, requests=requests or concurrency)


def test_everything_at_once_where_all_fits():
    steps = schedule(layout_of([FULL]), 100, load_of(), 1_000)
    assert [step.tokens for step in steps] == [80, 4, 4, 4, 4]
    assert [step.sampled for step in steps] == [4] * 5
    assert steps[0].chunks == [(0, 20)] * 4
    assert steps[-1].contexts == [24] * 4  # the last token sampled is never computed


def test_prompts_are_read_in_chunks():
    steps = schedule(layout_of([FULL]), 100, load_of(concurrency=1, prompt=50), 20)
    assert [step.chunks for step in steps[:3]] == [[(0, 20)], [(20, 20)], [(40, 10)]]
    assert [step.sampled for step in steps[:3]] == [0, 0, 1]


def test_no_more_in_work_than_asked_for():
    steps = schedule(layout_of([FULL]), 1_000, load_of(concurrency=3, requests=10), 1_000)
    assert max(step.running for step in steps) == 3
    assert sum(step.sampled for step in steps) == 10 * 5


def test_tight_caches_hold_fewer_and_the_youngest_starts_again():
    # blocks of 16: a prompt of 20 needs 2, a whole request of 40 needs 3; 5 of 6 blocks are there
    steps = schedule(layout_of([FULL]), 6, load_of(concurrency=2, prompt=20, output=20), 1_000)
    assert sum(step.preempted for step in steps) == 1
    assert sum(step.sampled for step in steps) == 2 * 20
    assert max(step.running for step in steps) == 2


def test_a_request_that_never_fits_is_refused():
    with pytest.raises(DataError, match="needs 3 blocks"):
        schedule(layout_of([FULL]), 3, load_of(concurrency=1, prompt=20, output=20), 1_000)


@pytest.mark.parametrize("reach", [None, 1, 7, 30, 100])
def test_pairs_and_reads_are_counted_one_by_one(reach):
    step = Step(chunks=[(0, 1), (0, 40), (25, 30), (90, 3)], contexts=[1, 7, 200])
    seen = [min(position + 1, reach or 10**9) for start, n in step.chunks for position in range(start, start + n)]
    assert step.pairs(reach) == sum(seen)
    assert step.reads(reach) == sum(min(context, reach or 10**9) for context in step.contexts)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt_neox"])
def test_work_is_that_of_the_weights_in_place(family):
    model = make_model(family)
    plan = [NONE, window(8), FULL, NONE]
    work = work_of(model.config, plan, model.dtype)
    full = work_of(model.config, [FULL] * 4, model.dtype)
    layers = model.base_model.layers
    assert full.token_flops == 2 * sum(p.numel() for layer in layers for p in layer.parameters())
    attention = getattr(layers[0], "self_attn", None) or layers[0].attention
    gone = full.token_flops - work.token_flops
    assert gone >= 2 * 2 * sum(p.numel() for p in attention.parameters())
    assert gone < full.token_flops / 2
    assert sum(work.attentions.values()) == 2
    assert work.pair_flops == 4 * 4 * 8


def test_a_token_meets_some_experts_alone():
    config = make_model("mixtral").config
    experts = 3 * 4 * config.hidden_size * config.intermediate_size
    dense = work_of(config, [FULL] * 4, make_model("mixtral").dtype).token_flops / 2
    everything = sum(p.numel() for layer in make_model("mixtral").base_model.layers for p in layer.parameters())
    assert dense == everything - 4 * experts / 2


SLOW = Device(
    name="made up", how="by hand", flops=1e9, bandwidth=1e9, attention_flops=5e8, kv_bandwidth=2e8, memory=1e9,
    step_seconds=1e-3, sequence_seconds=1e-5, call_seconds=2e-6,
)  # fmt: skip


def tiny_work(plan):
    return work_of(make_model("llama").config, plan, make_model("llama").dtype)


def test_time_adds_up():
    work = tiny_work([FULL, window(8), NONE, NONE])
    counts = Counts.of(work, [Step(chunks=[(0, 10)], contexts=[20], sampled=2, running=2)])
    weights = max((11 * work.token_flops + 2 * work.head_flops) / 1e9, work.weight_bytes / 1e9)
    pairs, reads = 55 + (36 + 2 * 8), 20 + 8
    expected = 1e-3 + 2e-5 + weights + pairs * work.pair_flops / 5e8 + reads * work.kv_bytes / 2e8 + 2 * 2 * 2e-6
    assert step_seconds(work, counts, SLOW)[0] == pytest.approx(expected)


@pytest.mark.parametrize("key", ["flops", "bandwidth", "attention_flops", "kv_bandwidth", "memory"])
@pytest.mark.parametrize("value", [0, -1, "inf", "nan"])
def test_a_device_that_cannot_be(tmp_path, key, value):
    path = tmp_path / "device.json"
    path.write_text(json.dumps(SLOW.model_dump() | {key: value}))
    with pytest.raises(UsageError, match=key):
        find_device(str(path))


def test_less_attention_is_never_slower():
    load = load_of(concurrency=8, prompt=64, output=16)
    rates = []
    for plan in ([FULL] * 4, [FULL, FULL, window(16), window(16)], [FULL, window(16), NONE, NONE]):
        work, layout = tiny_work(plan), layout_of(plan, 16, 128)
        rates.append(predict(work, layout, 50 * 16 * 128 * 4, load, SLOW, 64).tokens_per_second)
    assert rates == sorted(rates)
    assert rates[-1] > 1.2 * rates[0]


def test_calibration_finds_the_device_that_made_the_measurements():
    measured = []
    for plan in ([FULL] * 4, [FULL, window(16), NONE, NONE]):
        for concurrency, prompt in ((1, 128), (16, 32), (16, 200), (64, 64)):
            work = tiny_work(plan)
            load = load_of(concurrency, prompt, 24)
            counts = Counts.of(work, schedule(layout_of(plan, 16, 128), 4_000, load, 256))
            measured.append(Measured("", work, counts, float(step_seconds(work, counts, SLOW).sum())))
    start = SLOW.model_copy(update={"flops": 4e9, "kv_bandwidth": 1e9, "step_seconds": 5e-3, "call_seconds": 0.0})
    off = [one.predicted(start) / one.seconds for one in measured]
    found = calibrate(measured[:6], start)
    errors = [one.predicted(found) / one.seconds - 1 for one in measured[6:]]
    assert np.abs(np.log(off)).max() > 0.3
    assert np.abs(errors).max() < 0.05
    assert "6 measured" in found.how


def test_devices_by_name_by_file_and_several(tmp_path):
    one = known_device("h100")
    eight = one.times(8)
    assert (eight.flops, eight.memory, eight.step_seconds) == (8 * one.flops, 8 * one.memory, one.step_seconds)
    (tmp_path / "mine.json").write_text(one.model_dump_json())
    assert find_device(str(tmp_path / "mine.json")) == one
    with pytest.raises(UsageError, match="device must be one of a10"):
        find_device("h1000")
    (tmp_path / "other.json").write_text('{"name": "x", "flop": 1}')
    with pytest.raises(UsageError, match="unknown key flop; did you mean flops"):
        find_device(str(tmp_path / "other.json"))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_scale(name):
    own, half = shape_config(name), shape_config(name, width=0.5, num_hidden_layers=8)
    assert half.hidden_size == own.hidden_size // 2
    assert half.num_attention_heads == own.num_attention_heads // 2
    assert half.head_dim == own.head_dim
    assert half.num_hidden_layers == 8
    assert half.vocab_size == own.vocab_size
    label = Shape(name=name, layers=8, width=0.5).label
    assert f"layers 8 of {own.num_hidden_layers}" in label
    assert "width x 0.5" in label
    assert "random weights" in label


def test_shapes_that_are_none():
    with pytest.raises(UsageError, match="shape must be one of qwen3-4b"):
        shape_config("qwen3")
    with pytest.raises(UsageError, match=r"width 0.3 makes .* choose one that keeps it whole"):
        shape_config("qwen3-4b", width=0.3)
    with pytest.raises(UsageError, match="cannot share"):
        shape_config("qwen3-4b", num_key_value_heads=5)


@pytest.mark.parametrize(("layers", "counts"), [(8, (2, 4, 2)), (36, (9, 18, 9)), (4, (1, 2, 1)), (1, (0, 1, 0))])
def test_shares_become_layers_spread_evenly(layers, counts):
    plan = mixed_plan("25/50/25", layers, 64)
    assert (
        tuple(
            sum(layer.mixer == mixer for layer in plan)
            for mixer in ("full_attention", "sliding_attention", "no_attention")
        )
        == counts
    )
    if layers == 36:
        halves = plan[:18], plan[18:]
        assert abs(sum(layer.mixer == "no_attention" for layer in halves[0]) - 4.5) <= 1


def test_a_plan_is_a_file_or_shares(tmp_path):
    path = tmp_path / "plan.json"
    save(Plan(layers=mixed_plan("50/50/0", 4, 8)), path)
    assert named_plan(str(path), 4) == Shape(name="qwen3-4b", plan=str(path)).layer_plan(4) == load(Plan, path).layers
    assert named_plan("25/50/25", 8) == Shape(name="qwen3-4b").layer_plan(8) == mixed_plan("25/50/25", 8, 64)
    assert named_plan("25/50/25", 8, 16) == Shape(name="qwen3-4b", window=16).layer_plan(8)
    with pytest.raises(UsageError, match=r"window 16 is for shares such as 25/50/25; .*plan.json has its own"):
        named_plan(str(path), 4, 16)


@pytest.mark.parametrize("shares", ["25/50", "a/b/c", "50/50/50", "-10/60/50", "25-50-25"])
def test_shares_that_are_none(shares):
    with pytest.raises(UsageError, match="three percentages that add up to 100"):
        mixed_plan(shares, 8, 64)
