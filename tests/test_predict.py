"""predict and calibrate: what is said of a plan, and of how well it was foretold."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from layerboost import cost, predict, report
from layerboost.artifacts import Bench, Load, Served, ServingCell, load, save
from layerboost.bench.vllm_engine import label, paired
from layerboost.cli import app
from layerboost.cost.device import Device, find_device
from layerboost.cost.work import work_of
from layerboost.errors import DataError, UsageError
from layerboost.layer_plan import full_plan
from layerboost.model.shapes import Shape
from layerboost.vllm.kv import kv_layout

SHAPE = Shape(name="qwen3-4b", layers=8, width=0.125, vocabulary=4096, heads=16, kv_heads=4, head_dim=32)
TRUTH = Device(
    name="made up", how="by hand", flops=4e10, bandwidth=8e9, attention_flops=1e10, kv_bandwidth=3e9, memory=2e10,
    step_seconds=4e-3, sequence_seconds=6e-5, call_seconds=5e-6,
)  # fmt: skip


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def made_up_bench(path: Path, plan="25/50/25", loads=((200, 256, 64), (50, 512, 128), (20, 64, 200))):
    """A bench of vLLM as the device above would have given it, with a little noise."""
    shape = SHAPE.model_copy(update={"plan": plan})
    config, layers = shape.config(), shape.layer_plan(8)
    cells = []
    for number, (concurrency, prompt, output) in enumerate(loads):
        asked = Load(concurrency=concurrency, prompt_tokens=prompt, output_tokens=output, requests=concurrency)
        runs, memory = {}, 60_000_000
        for name, mixers in (("base", full_plan(8)), ("healed", layers)):
            work = work_of(config, mixers, torch.float32)
            layout = kv_layout(mixers, [None] * 8, int(work.kv_bytes), 32)
            steps = cost.schedule(layout, memory // layout.block_bytes, asked, 2_048)
            seconds = float(cost.step_seconds(work, cost.Counts.of(work, steps), TRUTH).sum())
            runs[name] = [
                Served(
                    seconds=seconds * noise, cpu_seconds=2 * seconds * noise, steps=len(steps), ttft=0.1, ttft_p99=0.2,
                    output_tokens=concurrency * output, tpot=0.01 * (number + 1), tpot_p99=0.02, running=3.0,
                    running_max=4, preemptions=0, prefix_hit_rate=0.0, kv_used=0.9, kv_used_last=0.1,
                    peak_memory=10**9,
                )
                for noise in (0.99, 1.0, 1.02)
            ]  # fmt: skip
        cells.append(
            ServingCell(
                kv="limited", kv_memory=memory, load=asked, runs=runs, kv_bytes_per_token={"base": 8.0, "healed": 3.0},
                kv_capacity={"base": 100, "healed": 300}, throughput=paired(runs, "seconds"),
                cpu_throughput=paired(runs, "cpu_seconds"),
            )
        )  # fmt: skip
    settings = {
        "model": shape.label + " <b>", "plan": [layer.entry() for layer in layers], "vllm": "0", "repeats": 3,
        "base_config": config.to_diff_dict(), "dtype": "float32", "block_size": 32, "max_num_batched_tokens": 2_048,
        "device": "cpu", "threads": 2, "serving": {"tensor_parallel": 1},
    }  # fmt: skip
    bench = Bench(
        settings=settings, seconds={}, speed={label(cell): cell.throughput for cell in cells}, context=320,
        kv_bytes_per_token={"base": 8.0, "healed": 3.0}, parameters={"base": 2, "healed": 1}, serving=cells,
        provenance={"versions": {"vllm": "0"}, "machine": "none"},
    )  # fmt: skip
    save(bench, path)
    return path


@pytest.fixture(scope="module")
def benches(tmp_path_factory):
    root = tmp_path_factory.mktemp("benches")
    more = ((100, 1_024, 64), (200, 128, 128), (8, 300, 300))
    return [
        made_up_bench(root / "a.json"),
        made_up_bench(root / "b.json", "50/25/25"),
        made_up_bench(root / "c.json", loads=more),
        made_up_bench(root / "d.json", "12.5/75/12.5", more),
    ]


def test_four_loads_foretell_the_others(benches, tmp_path, monkeypatch):
    probed = TRUTH.model_copy(
        update={"name": "cpu", "flops": 9e10, "kv_bandwidth": 1e10, "attention_flops": 6e10, "step_seconds": 2e-3}
    )
    monkeypatch.setattr(predict, "find_device", lambda name: probed)
    rows = predict.calibrate_on(benches, "0,2,6,8", "seconds", out=tmp_path / "device.json")
    assert [row.fitted for row in rows].count(True) == 4
    others = [row for row in rows if not row.fitted]
    assert len(others) == 8
    assert max(abs(row.ratio_error) for row in others) < 0.1
    assert max(abs(row.base_error) for row in others) < 0.1
    assert "8 loads that were not fitted" in predict.summary(rows)
    device = find_device(str(tmp_path / "device.json"))
    assert "calibrated on 8 measured" in device.how


def test_calibrate_as_a_command(benches, tmp_path):
    done = invoke("calibrate", *benches, "--out", tmp_path / "device.json")
    assert done.exit_code == 0, done.output
    assert done.output.count("fitted") >= 4
    again = invoke("predict", "--shape", "qwen3-4b", "--device", tmp_path / "device.json", "concurrency=10")
    assert again.exit_code == 0, again.output
    assert "an estimate" in again.output
    assert "the hybrid's layers: 18 W64, 9 F, 9 N" in again.output


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--cells", "0,1,2,3,4"], 2, "at most 4 numbers from 0 to 2"),
        (["--cells", "0,99"], 2, "at most 4 numbers from 0 to 2"),
        (["--cells", "a"], 2, "must be numbers such as 0,5,9"),
        (["--clock", "sundial"], 2, "clock must be seconds or cpu_seconds"),
    ],
)
def test_calibrate_says_what_is_wrong(benches, tmp_path, arguments, code, message):
    done = invoke("calibrate", benches[0], "--out", tmp_path / "device.json", *arguments)
    assert done.exit_code == code
    assert message in done.output
    assert not (tmp_path / "device.json").exists()


def test_calibrate_is_for_the_machine_that_was_measured(benches, tmp_path):
    found = load(Bench, benches[0])
    elsewhere = "cpu" if torch.cuda.is_available() else "cuda"
    save(found.model_copy(update={"settings": found.settings | {"device": elsewhere}}), tmp_path / "bench.json")
    done = invoke("calibrate", tmp_path / "bench.json", "--out", tmp_path / "device.json")
    assert done.exit_code == 2
    assert f"was measured on {elsewhere}" in " ".join(done.output.split())
    assert not (tmp_path / "device.json").exists()


def test_a_cache_that_was_spread_is_played_through_whole(benches):
    """So much memory on each of two devices is as much as twice of it on one."""
    found = load(Bench, benches[0])
    cell = found.serving[0]
    two = found.model_copy(update={"settings": found.settings | {"serving": {"tensor_parallel": 2}}})
    twice = cell.model_copy(update={"kv_memory": 2 * cell.kv_memory})
    spread, whole, half = (
        predict._both(bench, measured, "seconds")[0].predicted(TRUTH)
        for bench, measured in ((two, cell), (found, twice), (found, cell))
    )
    assert spread == whole < half


def test_calibrate_replaces_devices_alone(benches, tmp_path):
    before = benches[0].read_bytes()
    done = invoke("calibrate", benches[0], "--out", benches[0])
    assert done.exit_code == 2
    assert "exists and is no device.json of layerboost" in done.output
    assert benches[0].read_bytes() == before
    for _ in range(2):
        assert invoke("calibrate", benches[0], "--out", tmp_path / "device.json").exit_code == 0


def test_a_bench_of_transformers_is_not_one_of_vllm(benches, tmp_path):
    bench = load(Bench, benches[0]).model_copy(update={"serving": []})
    save(bench, tmp_path / "bench.json")
    for verb in (
        ["calibrate", tmp_path / "bench.json", "--out", tmp_path / "d.json"],
        ["report", tmp_path / "bench.json"],
    ):
        done = invoke(*verb)
        assert done.exit_code == 2
        assert "is not a bench of vLLM" in done.output


def test_a_page_for_a_bench(benches):
    path = report.run(benches[0])
    page = path.read_text()
    assert path == benches[0].with_suffix(".html")
    assert page.count("<svg") == 1
    assert "&lt;b&gt;" in page
    assert "<b>" not in page.partition("</h1>")[0].partition("<h1>")[2]
    assert "200" in page
    assert report.run(benches[0]).read_text() == page


def test_predict_a_hybrid_a_plan_and_a_shape(tiny, tmp_path):
    asked = ["concurrency=20", "prompt_tokens=100", "output_tokens=20", "kv_memory=200000"]
    (tmp_path / "plan.json").write_text(
        json.dumps({"schema": 1, "layers": [{"mixer": "full_attention"}] + [{"mixer": "no_attention"}] * 3})
    )
    hybrid = tmp_path / "hybrid"
    assert invoke("convert", tiny, tmp_path / "plan.json", "--out", hybrid).exit_code == 0
    found = [
        invoke("predict", hybrid, *asked),
        invoke("predict", tiny, "--plan", tmp_path / "plan.json", *asked),
        invoke("predict", tiny, "--plan", "25/0/75", *asked),
        invoke("predict", "--shape", "llama-3.1-8b", "--devices", "8", "--window", "128"),
    ]
    for done in found:
        assert done.exit_code == 0, done.output
        assert "output tokens/s" in done.output
    numbers = [done.output.partition("output tokens/s")[2].split()[:12] for done in found[:2]]
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name a hybrid, an original and its --plan, or a known shape"),
        (["--plan", "25/50/25"], 2, "--plan is for --shape"),
        (["reference", "--shape", "qwen3-4b"], 2, "leave one of the two out"),
        (["reference", "--plan", "25/50/25", "--layers", "4"], 2, "--layers is for --shape"),
        (["--shape", "gpt-5"], 2, "shape must be one of qwen3-4b"),
        (["--shape", "qwen3-4b", "--device", "abacus"], 2, "device must be one of a10"),
        (["--shape", "qwen3-4b", "--plan", "0/0/100"], 4, "no layer has attention"),
        (["--shape", "qwen3-4b", "concurency=3"], 2, "unknown key concurency; did you mean concurrency"),
        (["--shape", "llama-3.1-8b", "--device", "a10", "dtype=float32"], 5, "leave no memory for a cache"),
        (["--shape", "qwen3-4b", "kv_memory=1000000"], 5, "give it more memory or shorten the request"),
    ],
)
def test_predict_says_what_is_wrong(arguments, code, message):
    done = invoke("predict", *arguments)
    assert done.exit_code == code, done.output
    assert message in " ".join(done.output.split())


def test_several_devices_hold_more():
    one = predict.run_shape(Shape(name="llama-3.1-8b"), device="h100")
    eight = predict.run_shape(Shape(name="llama-3.1-8b"), device="h100", devices=8)
    assert eight.kv_memory["base"] > 8 * one.kv_memory["base"]
    assert one.base.tokens_per_second < eight.base.tokens_per_second < 8 * one.base.tokens_per_second
    with pytest.raises(DataError):
        predict.run_shape(Shape(name="llama-3.1-8b"), predict.Config(dtype="float32"), device="l4")
    with pytest.raises(UsageError):
        predict.run_shape(Shape(name="llama"))


def test_requests_longer_than_the_context_are_said():
    few = ["predict", "reference", "--plan", "25/50/25", "concurrency=2", "output_tokens=24"]
    longer, enough = (invoke(*few, f"prompt_tokens={prompt}") for prompt in (1_001, 1_000))
    assert longer.exit_code == enough.exit_code == 0
    assert "requests of 1,025 tokens are longer than the 1,024" in " ".join(longer.stderr.split())
    assert "longer than" not in enough.stderr
