"""Bench: what the cache really holds, base and hybrid alike."""

import pytest
import torch

from layerboost.bench import ratio
from layerboost.bench.transformers_engine import kv_bytes
from layerboost.model.loading import load_model, load_original
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
    found = ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (found.min, found.median, found.max) == (1.0, 2.0, 3.0)
    assert ratio([3.0, 1.0], [1.0, 2.0]).median == pytest.approx(1.75)
