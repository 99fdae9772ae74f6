"""Families without a row in the contract: found by looking, proven on their weights, or refused with the reason."""

import pytest
import torch

from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError
from layerboost.heal import Config as HealConfig
from layerboost.heal.student import Counts, Healer
from layerboost.model import selfcheck
from layerboost.model.families import VERIFIED
from layerboost.model.loading import describe, load_original, read_config
from layerboost.model.overview import overview
from tests.tiny import FULL, NONE, linear, make_checkpoint, native_windows, reference_logits, some_tokens, window

OTHERS = (
    "olmo3", "glm4", "gpt_oss", "phi", "qwen2_moe", "ministral", "cohere", "afmoe", "apertus", "arcee", "aria_text",
    "biogpt", "bitnet", "cohere2_moe", "cwm", "diffllama", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe",
    "flex_olmo", "gemma", "glm", "gpt2", "gpt_bigcode", "granite_swa", "granitemoe", "granitemoeshared", "helium",
    "hunyuan_v1_dense", "hy_v3", "hyperclovax", "jais2", "laguna", "lfm2", "mellum", "minimax_m2", "ministral3",
    "nanochat", "olmo", "olmoe", "persimmon", "phimoe", "seed_oss", "vaultgemma",
)  # fmt: skip
OTHER_NAMES = {"gpt2": {"n_layer": 4}, "gpt_bigcode": {"n_layer": 4}}


@pytest.mark.parametrize("family", OTHERS)
@torch.no_grad()
def test_families_built_alike_compute_what_hooks_compute(tmp_path, family):
    folder = make_checkpoint(tmp_path, family, **OTHER_NAMES.get(family, {}))
    model = load_original(folder)  # proves itself
    native = native_windows(model.config, 4)
    layers = [NONE, window(5), FULL, window(3)]
    sinks = hasattr(getattr(model.decoder_layers[2], model.anatomy.attention), "sinks")
    if not any(native) and not sinks and family != "diffllama":
        layers[2] = linear("gla")
    tokens = some_tokens(2, 30)
    model.convert(layers)
    mixers = {
        i: getattr(layer, model.anatomy.attention)._modules.get("mixer") for i, layer in enumerate(model.decoder_layers)
    }
    wanted = reference_logits(folder, layers, tokens, mixers=mixers)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, wanted, atol=5e-5, rtol=2e-4)


def test_an_attention_that_attends_twice_gets_no_linear_attention(tmp_path):
    model = load_original(make_checkpoint(tmp_path, "diffllama"))
    model.convert([linear("gla"), FULL, FULL, FULL])
    with pytest.raises(CheckpointError, match="attends more than once per layer"):
        model(some_tokens(1, 8))


@torch.no_grad()
def test_multi_query_attention_has_one_state(tmp_path):
    model = load_original(make_checkpoint(tmp_path, "gpt_bigcode", n_layer=4))
    assert describe(tmp_path, tmp_path, read_config(tmp_path)).kv_shape.num_key_value_heads == 1
    model.convert([linear("lolcats", 5)] * 4)
    cache = model(some_tokens(1, 8)).past_key_values
    assert cache.layers[0].state.shape[1] == 1


def test_native_windows_as_wide_as_the_context_are_none(tmp_path):
    folder = make_checkpoint(tmp_path, "phi3", sliding_window=1_024)  # as Phi-3-mini-128k has
    assert describe(folder, folder, read_config(folder)).native_windows == [None] * 4


def test_healing_gpt2_adapts_its_own_kind_of_linear(tmp_path):
    model = load_original(make_checkpoint(tmp_path, "gpt2", n_layer=4))
    healer = Healer(model, [NONE, FULL, FULL, FULL], HealConfig())
    assert len(healer.targets) == 3 * 2 + 4 * 2
    tokens = some_tokens(2, 24)
    batch = Sequences(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert healer.backward(batch, Counts.of(batch)) > 0


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("stablelm", "could not be followed .it hands no further arguments to its attention"),
        ("bloom", "does not go through transformers' attention interface"),
        ("opt", "no single list of decoder layers"),
        ("mimo_v2_flash", "its cache holds [0-9]+ bytes, where [0-9]+ follow from its configuration"),
        ("mamba2", "mixers other than softmax attention already"),
        ("gemma3n_text", "share keys and values|not a valid gemma3n_text"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(tmp_path, family, message):
    sizes = {"bloom": {"n_layer": 4}, "mimo_v2_flash": {"v_head_dim": 4}}.get(family, {})
    if family in ("mamba2", "gemma3n_text"):  # not built from the common sizes: the configuration is enough
        (tmp_path / "config.json").write_text(f'{{"model_type": "{family}"}}')
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        load_original(make_checkpoint(tmp_path, family, **sizes))


@pytest.mark.parametrize("broken", ["window", "none", "cache"])
def test_a_family_that_computes_something_else_is_refused(tiny, monkeypatch, broken):
    """The proof notices each of its cases: break one, with the family not taken for verified."""
    monkeypatch.setattr(selfcheck, "VERIFIED", ())
    load_original(tiny)
    from layerboost.model import cache, mixers

    if broken == "window":
        monkeypatch.setattr(mixers, "sliding_window_attention", lambda q, k, v, **_: torch.zeros_like(q))
    elif broken == "none":
        monkeypatch.setattr(mixers.NoAttention, "forward", lambda self, hidden_states, **_: (hidden_states, None))
    else:
        monkeypatch.setattr(cache.WindowLayer, "update", lambda self, k, v, *a, **b: (k, v))
    with pytest.raises(CheckpointError, match=r"no tests for this family, and tried on this model"):
        load_original(tiny)


def test_a_family_that_does_not_build_by_default_has_to_be_tried(monkeypatch):
    def broken(_):
        raise ValueError("no default\nfor this")

    monkeypatch.setattr("layerboost.model.overview.base_config_class", broken)
    (found,) = (entry for entry in overview(everything=True) if entry.family == "olmo3")
    assert found.supported is None
    assert found.how == "try it: its default configuration does not build here (no default)"


def test_the_overview_says_what_is_supported_and_why_not():
    found = {entry.family: entry for entry in overview(everything=True)}
    assert list(found)[: len(VERIFIED)] == list(VERIFIED)
    assert all(found[family].supported and found[family].how.startswith("contract tests") for family in VERIFIED)
    assert all(found[family].supported for family in ("olmo3", "gpt_oss", "phi"))
    assert found["bloom"].supported is False
    assert not found["stablelm"].supported
    assert "attention interface" in found["bloom"].how
    assert [entry.family for entry in overview(everything=False)] == list(VERIFIED)
