"""The bench on vLLM: what is asked of the engines is what they do, and the cost model foretells it step by step."""

import pytest
import torch

from layerboost.artifacts import Bench, load
from layerboost.bench import Config, Serving, run, run_shape
from layerboost.cost import schedule
from layerboost.cost.work import work_of
from layerboost.errors import DataError, EnvironmentTrouble, PlanError
from layerboost.layer_plan import full_plan
from layerboost.model.loading import load_original
from layerboost.model.saving import save_hybrid
from layerboost.model.shapes import Shape
from layerboost.vllm.kv import kv_layout
from tests.tiny import FULL, NONE, linear, make_checkpoint, window

pytest.importorskip("vllm", exc_type=ImportError)

SHAPE = Shape(
    name="llama-3.2-1b", layers=6, width=0.0625, vocabulary=300, heads=4, kv_heads=2, head_dim=32, window=32
)  # fmt: skip
SIZES = {"head_dim": 32, "hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny models are slower with more, above all beside other work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    serving = Serving(
        concurrency=[6, 12], prompt_tokens=100, output_tokens=40, rounds=2, kv=["ample", "limited"], limited_share=0.3,
        decode_batch=3, decode_lengths=[50], block_size=32, max_batched_tokens=160,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("bench") / "bench.json"
    shape = SHAPE.model_copy(update={"plan": "33/50/17"})
    run_shape(shape, Config(engine="vllm", repeats=2, serving=serving), out=out)
    return load(Bench, out)


def test_every_load_is_there_with_what_was_asked(bench):
    seen = [(c.kv, c.load.concurrency, c.load.output_tokens) for c in bench.serving]
    assert seen == [("ample", 6, 40), ("ample", 12, 40), ("ample", 3, 50), ("limited", 6, 40), ("limited", 12, 40)]
    for cell in bench.serving:
        for runs in cell.runs.values():
            assert len(runs) == 2
            for served in runs:
                assert served.output_tokens == cell.load.requests * cell.load.output_tokens
                assert served.running_max <= cell.load.concurrency
                assert served.prefix_hit_rate == 0
                assert served.ttft <= served.ttft_p99
                assert served.peak_memory > cell.kv_memory
        assert cell.throughput.min <= cell.throughput.median <= cell.throughput.max
    assert "random weights" in bench.settings["model"]


def layouts(bench):
    config = SHAPE.config()
    plan = SHAPE.model_copy(update={"plan": "33/50/17"}).layer_plan(6)
    for name, layers in (("base", full_plan(6)), ("healed", plan)):
        bytes_per_layer = int(work_of(config, layers, torch.float32).kv_bytes)
        yield name, kv_layout(layers, [None] * 6, bytes_per_layer, bench.settings["block_size"])


def test_the_scheduler_is_foretold_step_by_step(bench):
    preempted = 0
    for cell in bench.serving:
        for name, layout in layouts(bench):
            steps = schedule(layout, cell.kv_memory // layout.block_bytes, cell.load, 160)
            for served in cell.runs[name]:
                assert len(steps) == served.steps
                assert max(step.running for step in steps) == served.running_max
                assert sum(step.preempted for step in steps) == served.preemptions
                preempted += served.preemptions
    assert preempted > 0


def test_cache_bytes_are_those_of_the_layout(bench):
    for cell in bench.serving:
        tokens = cell.load.prompt_tokens + cell.load.output_tokens
        for name, layout in layouts(bench):
            assert cell.kv_bytes_per_token[name] * tokens == pytest.approx(layout.sequence_bytes(tokens), rel=1e-6)
        held, capacity = cell.kv_bytes_per_token, cell.kv_capacity
        assert held["healed"] < held["base"]
        assert capacity["base"] == pytest.approx(cell.kv_memory / held["base"], rel=0.05)


def test_checkpoints_are_served_with_their_weights(tmp_path):
    base = make_checkpoint(tmp_path / "base", "qwen3", **SIZES)
    model = load_original(base)
    model.convert([NONE, window(16), FULL, window(16)])
    save_hybrid(model, tmp_path / "hybrid", original=base, inputs={}, what="test")
    serving = Serving(concurrency=[2], prompt_tokens=20, output_tokens=4, kv=["ample"])
    found = run(tmp_path / "hybrid", base, Config(engine="vllm", repeats=1, serving=serving))
    assert found.parameters["healed"] < found.parameters["base"]
    assert found.serving[0].runs["healed"][0].output_tokens == 8


def test_what_cannot_be_served_is_said_before_anything_starts(tmp_path, monkeypatch):
    base = make_checkpoint(tmp_path / "base", "qwen3", **SIZES)
    model = load_original(base)
    model.convert([FULL, linear("gla"), FULL, FULL])
    save_hybrid(model, tmp_path / "hybrid", original=base, inputs={}, what="test")
    with pytest.raises(PlanError, match="layer 1: linear_attention"):
        run(tmp_path / "hybrid", base, Config(engine="vllm"))
    with pytest.raises(DataError, match="make 132000 tokens, the model takes 131072"):
        run_shape(SHAPE, Config(engine="vllm", serving=Serving(prompt_tokens=131_936)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentTrouble, match="vLLM is not installed"):
        run_shape(SHAPE, Config(engine="vllm"))


def test_an_engine_that_does_not_start_is_one_line():
    serving = Serving(concurrency=[2], prompt_tokens=20, output_tokens=4, kv=[10**15])  # bytes, which are nowhere
    with pytest.raises(EnvironmentTrouble, match="vLLM could not serve the base model: ") as trouble:
        run_shape(SHAPE, Config(engine="vllm", serving=serving))
    assert "\n" not in str(trouble.value)
