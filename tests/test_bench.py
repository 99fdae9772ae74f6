"""Bench: what the cache really holds, base and hybrid alike."""

import pytest
import torch

from layerboost import bench
from layerboost.artifacts import Load, Ratio, Served
from layerboost.bench.transformers_engine import kv_bytes
from layerboost.bench.vllm_engine import _interleaved, _options, kv_memory
from layerboost.errors import DataError
from layerboost.model.loading import load_model, load_original, read_config
from tests.tiny import FULL, NONE, make_checkpoint, window

TOKEN = 2 * 2 * 8 * 4  # keys and values, heads, head size, float32


@torch.no_grad()
def test_cache_bytes_of_a_sequence(tiny):
    model = load_original(tiny)
    assert kv_bytes(load_model(tiny), 50) == kv_bytes(model, 50) == 4 * 50 * TOKEN
    model.convert([NONE, window(8), FULL, window(1)])
    assert kv_bytes(model, 50) == (7 + 50) * TOKEN


def test_native_windows_are_not_counted_as_whole_prompts(tmp_path):
    folder = make_checkpoint(tmp_path, "mistral", sliding_window=9)
    assert kv_bytes(load_original(folder), 50) == 4 * 8 * TOKEN
    assert kv_bytes(load_model(folder), 50) <= 4 * 9 * TOKEN


def test_ratios_are_paired():
    found = Ratio.of_times([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (found.min, found.median, found.max) == (1.0, 2.0, 3.0)
    assert Ratio.of_times([3.0, 1.0], [1.0, 2.0]).median == pytest.approx(1.75)


class FakeEngine:
    """Answers every load at once, with so many of its prompts from a cache."""

    facts = {"blocks": 10}  # noqa: RUF012

    def __init__(self, hit_rate):
        self.hit_rate, self.asked = hit_rate, []

    def measure(self, load, seed):
        self.asked.append((load.requests, seed))
        return Served(
            seconds=1.0, cpu_seconds=1.0, steps=1, output_tokens=1, ttft=1.0, ttft_p99=1.0, tpot=1.0, tpot_p99=1.0,
            running=1.0, running_max=1, preemptions=0, prefix_hit_rate=self.hit_rate, kv_used=0.5, kv_used_last=0.5,
            peak_memory=1,
        )  # fmt: skip


LOADS = [Load(concurrency=n, prompt_tokens=8, output_tokens=2, requests=n) for n in (2, 3)]


def test_prompts_out_of_a_prefix_cache_are_an_error():
    engines = {"base": FakeEngine(0.0), "healed": FakeEngine(0.01)}
    with pytest.raises(DataError, match=r"1.0% of the prompts came out of a prefix cache"):
        _interleaved(engines, LOADS, "ample", 1_000, 2)
    assert _interleaved(engines | {"healed": FakeEngine(0.009)}, LOADS, "ample", 1_000, 2)


def test_a_cache_that_is_spread_is_counted_whole():
    engines = {"base": FakeEngine(0.0), "healed": FakeEngine(0.0)}
    one, two = (_interleaved(engines, LOADS, "ample", 1_000, 1, devices)[0] for devices in (1, 2))
    assert one.kv_bytes_per_token["base"] == 0.5 * 900 / 10
    assert two.kv_bytes_per_token == {name: 2 * held for name, held in one.kv_bytes_per_token.items()}
    assert two.kv_capacity == one.kv_capacity


@pytest.mark.parametrize("layers", [[FULL] * 4, [window(8), FULL, NONE, window(8)]])
def test_the_cache_holds_a_request_at_least(tmp_path, layers):
    config = read_config(make_checkpoint(tmp_path / "base", "llama"))
    serving = bench.Serving(concurrency=[1], prompt_tokens=100, output_tokens=20)
    told = _options(config, layers, serving, 120, False)
    token = 4 * 2 * config.num_key_value_heads * config.head_dim * 4  # bytes of all four layers in float32
    least = kv_memory("limited", config, layers, serving, told)
    assert 120 * token <= least <= kv_memory("ample", config, layers, serving, told)
    assert kv_memory(least, config, layers, serving, told) == least
    with pytest.raises(DataError, match=f"kv {least - 1}: the longest request, of 120 tokens, takes {least} bytes"):
        kv_memory(least - 1, config, layers, serving, told)


def test_both_models_get_the_same_prompts_and_no_prompts_come_twice():
    engines = {"base": FakeEngine(0.0), "healed": FakeEngine(0.0)}
    _interleaved(engines, LOADS, "ample", 1_000, 3)
    base, hybrid = (sorted(engine.asked) for engine in engines.values())
    assert base == hybrid
    measured = [seed for requests, seed in base if requests > 1]
    assert len(measured) == len(set(measured)) == 6


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "vllm", "context": 64, "batch": 2, "repeats": 3}, "engine vllm does not look at batch, context"),
        ({"serving": bench.Serving()}, "engine transformers does not look at serving"),
        ({"engine": "vllm", "serving": bench.Serving()}, ""),
        ({"context": 64, "batch": 2}, ""),
    ],
)
def test_what_an_engine_does_not_look_at_is_said(monkeypatch, capfd, settings, said):
    for engine in ("_on_vllm", "_on_transformers"):
        monkeypatch.setattr(bench, engine, lambda *_: None)
    bench._measure(None, None, bench.Config(**settings), None)
    assert capfd.readouterr().err.strip() == said


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), (None, "bfloat16")]
)
def test_on_a_gpu_the_cache_is_counted_in_what_the_engine_is_told(tmp_path, monkeypatch, dtype, wanted):
    config = read_config(make_checkpoint(tmp_path / "base", "llama"))
    config.dtype = dtype
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _options(config, [FULL] * 4, bench.Serving(), 320, False)["dtype"] == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    told = _options(config, [FULL] * 4, bench.Serving(), 320, False)
    assert told["dtype"] == wanted
    counted = kv_memory("limited", config, [FULL] * 4, bench.Serving(), told)
    assert 2 * counted == kv_memory("limited", config, [FULL] * 4, bench.Serving(), told | {"dtype": "float32"})
