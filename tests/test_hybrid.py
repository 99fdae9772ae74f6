"""The hybrid model against the stock model with hooks: every family, every mixer, every place."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from layerboost.artifacts import full_plan
from layerboost.errors import CheckpointError, PlanError
from layerboost.model.cache import LengthOnlyLayer, WindowLayer, cache_bytes
from layerboost.model.loading import load_model, load_original
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, make_checkpoint, reference_logits, some_tokens, window

W = 7
PLANS = {
    "none first": [NONE, FULL, FULL, FULL],
    "none last": [FULL, FULL, FULL, NONE],
    "none all": [NONE] * 4,
    "window first": [window(W), FULL, FULL, FULL],
    "window last": [FULL, FULL, FULL, window(W)],
    "window all": [window(W)] * 4,
    "window of 1": [window(1), FULL, window(1), FULL],
    "mixed": [NONE, window(W), FULL, NONE],
    "two windows": [window(3), NONE, window(W), FULL],
}
NATIVE = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
}
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def converted(folder, layers):
    model = load_original(folder)
    model.convert(layers)
    return model


@pytest.fixture(scope="module")
def native_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {family: make_checkpoint(root / family, family, **changes) for family, changes in NATIVE.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_all_full_is_bit_equal_to_the_base(checkpoints, family, implementation):
    base = AutoModelForCausalLM.from_pretrained(checkpoints[family], attn_implementation=implementation).eval()
    hybrid = load_original(checkpoints[family])
    hybrid.set_attn_implementation(implementation)
    tokens, padding = some_tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    padding[0, :6] = 0
    assert torch.equal(hybrid(tokens).logits, base(tokens).logits)
    ours, theirs = (model(tokens, attention_mask=padding).logits for model in (hybrid, base))
    assert torch.equal(ours[padding.bool()], theirs[padding.bool()])
    greedy = {"max_new_tokens": 8, "do_sample": False, "attention_mask": padding}
    assert torch.equal(hybrid.generate(tokens, **greedy), base.generate(tokens, **greedy))


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_all_full_keeps_native_windows(native_checkpoints, family):
    base = AutoModelForCausalLM.from_pretrained(native_checkpoints[family]).eval()
    hybrid = load_original(native_checkpoints[family])
    tokens = some_tokens(2, 40)
    assert torch.equal(hybrid(tokens).logits, base(tokens).logits)
    ours, theirs = (DynamicCache(config=model.config) for model in (hybrid, base))
    for part in tokens.split([20, 19, 1], 1):
        got, wanted = hybrid(part, past_key_values=ours).logits, base(part, past_key_values=theirs).logits
    torch.testing.assert_close(got, wanted, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_matches_the_reference(checkpoints, family, name):
    hybrid = converted(checkpoints[family], PLANS[name])
    for length in (1, W - 1, W, W + 1, 40):
        tokens = some_tokens(2, length)
        wanted = reference_logits(checkpoints[family], PLANS[name], tokens)
        torch.testing.assert_close(hybrid(tokens).logits, wanted, **CLOSE)


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_matches_the_reference_beside_native_windows(native_checkpoints, family):
    layers = [FULL, window(5), NONE, FULL]
    tokens = some_tokens(2, 40)
    hybrid = converted(native_checkpoints[family], layers)
    torch.testing.assert_close(
        hybrid(tokens).logits, reference_logits(native_checkpoints[family], layers, tokens), **CLOSE
    )


@torch.no_grad()
def test_a_window_one_wider_is_noticed(tiny):
    tokens = some_tokens(2, 40)
    wanted = reference_logits(tiny, [window(W)] * 4, tokens)
    for other in (W - 1, W + 1):
        assert (converted(tiny, [window(other)] * 4)(tokens).logits - wanted).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_cache_equals_no_cache(checkpoints, family, name):
    hybrid = converted(checkpoints[family], PLANS[name])
    tokens = some_tokens(2, 30)
    wanted = hybrid(tokens, use_cache=False).logits
    for prompt in (W - 1, W, W + 1, 20):
        for cache in (None, DynamicCache(), DynamicCache(config=hybrid.config)):
            found = []
            for part in tokens.split([prompt, 3] + [1] * (27 - prompt), 1):
                out = hybrid(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                found.append(out.logits)
            torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)
            assert cache.get_seq_length() == 30


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_static_cache(tiny, name):
    hybrid = converted(tiny, PLANS[name])
    tokens = some_tokens(2, 20)
    greedy = {"max_new_tokens": 10, "do_sample": False, "min_new_tokens": 10}
    wanted = hybrid.generate(tokens, use_cache=False, **greedy)
    assert torch.equal(hybrid.generate(tokens, **greedy), wanted)
    cache = StaticCache(config=hybrid.config, max_cache_len=40)
    assert torch.equal(hybrid.generate(tokens, past_key_values=cache, **greedy), wanted)


@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_beam_search_with_and_without_cache(tiny, name):
    hybrid = converted(tiny, PLANS[name])
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    tokens = some_tokens(2, 12)
    assert torch.equal(hybrid.generate(tokens, **beams), hybrid.generate(tokens, use_cache=False, **beams))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_left_padding_and_batches_change_nothing(checkpoints, family, name):
    hybrid = converted(checkpoints[family], PLANS[name])
    rows = [some_tokens(1, length, seed=length) for length in (5, W, 12, 20)]
    padded = torch.ones(4, 20, dtype=torch.long)
    mask = torch.zeros(4, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 20 - row.shape[1] :], mask[i, 20 - row.shape[1] :] = row[0], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = hybrid(padded, attention_mask=mask, position_ids=positions).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i, 20 - row.shape[1] :], hybrid(row).logits[0], **CLOSE)
    greedy = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    written = hybrid.generate(padded, attention_mask=mask, **greedy)
    for i, row in enumerate(rows):
        assert torch.equal(written[i, 20:], hybrid.generate(row, **greedy)[0, row.shape[1] :])


@torch.no_grad()
def test_cache_holds_what_the_plan_says(tiny):
    layers = [NONE, window(W), FULL, window(1)]
    hybrid = converted(tiny, layers)
    cache = hybrid(some_tokens(1, 30), use_cache=True).past_key_values
    assert [type(layer).__name__ for layer in cache.layers] == [
        "LengthOnlyLayer", "WindowLayer", "DynamicLayer", "WindowLayer",
    ]  # fmt: skip
    token = 2 * 2 * 8 * 4  # keys and values, heads, head size, float32
    assert cache_bytes(cache) == (W - 1 + 30) * token
    for _ in range(3):
        hybrid(some_tokens(1, 1), past_key_values=cache)
    assert cache_bytes(cache) == (W - 1 + 33) * token
    assert isinstance(cache.layers[0], LengthOnlyLayer)
    assert isinstance(cache.layers[1], WindowLayer)


@torch.no_grad()
def test_layers_of_a_users_own_cache_are_kept(tiny):
    """Quantised ones, for instance: only removed layers are replaced, and masks carry the windows."""

    class Own(DynamicLayer):
        pass

    hybrid = converted(tiny, PLANS["mixed"])
    tokens = some_tokens(1, 30)
    cache = Cache(layers=[Own() for _ in range(4)])
    found = [hybrid(part, past_key_values=cache).logits for part in tokens.split([20, 1, 9], 1)]
    assert [type(layer) for layer in cache.layers] == [LengthOnlyLayer, Own, Own, LengthOnlyLayer]
    torch.testing.assert_close(torch.cat(found, 1), hybrid(tokens, use_cache=False).logits, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saves_and_opens_through_the_auto_classes(checkpoints, tmp_path, family):
    hybrid = converted(checkpoints[family], PLANS["mixed"])
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again).__name__ == type(hybrid).__name__
    assert [plan.entry() for plan in again.plan] == [plan.entry() for plan in PLANS["mixed"]]
    tokens = some_tokens(2, 30)
    assert torch.equal(again(tokens).logits, hybrid(tokens).logits)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == f"layerboost_{family}"
    assert config.architectures == [type(hybrid).__name__]
    assert config.layerboost["layers"][1] == {"mixer": "sliding_attention", "window": W}


def test_nothing_of_a_removed_attention_is_stored(tiny, tmp_path):
    hybrid = converted(tiny, PLANS["mixed"])
    names = set(hybrid.state_dict())
    original = set(load_original(tiny).state_dict())
    gone = tuple(f"model.layers.{i}.{part}" for i in (0, 3) for part in ("self_attn.", "input_layernorm."))
    assert original - names == {name for name in original if name.startswith(gone)}
    assert names <= original


@torch.no_grad()
def test_mixed_borrows_and_gives_back(tiny):
    model = load_original(tiny)
    tokens = some_tokens(2, 30)
    before = model(tokens).logits
    for layers in PLANS.values():
        with model.mixed(dict(enumerate(layers))):
            assert model.plan == layers
            inside = model(tokens).logits
        assert torch.equal(inside, converted(tiny, layers)(tokens).logits)
        assert torch.equal(model(tokens).logits, before)
    with pytest.raises(RuntimeError, match="on purpose"), model.mixed({0: NONE}):
        raise RuntimeError("on purpose")
    assert torch.equal(model(tokens).logits, before)
    assert model.plan == full_plan(4)


def test_wrong_plans_are_refused(tiny, native_checkpoints):
    with pytest.raises(PlanError, match=r"plan has 3 layers, model has 4 \(num_hidden_layers\)"):
        converted(tiny, [FULL] * 3)
    with pytest.raises(PlanError, match="layer 1: window 10 is wider than the layer's native window of 9"):
        converted(native_checkpoints["mistral"], [FULL, window(10), FULL, FULL])
    converted(native_checkpoints["mistral"], [FULL, window(9), FULL, FULL])
    converted(native_checkpoints["qwen2"], [window(100), FULL, FULL, window(9)])


def test_missing_and_unexpected_tensors_are_errors(tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    hybrid = converted(tiny, PLANS["mixed"])
    hybrid.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    dropped = {name: t for name, t in tensors.items() if name != "model.layers.1.self_attn.q_proj.weight"}
    save_file(dropped, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not there: .*q_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    save_file(
        tensors | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)}, weights, metadata={"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="no place"):
        load_model(tmp_path)


def test_a_stock_loader_refuses_a_hybrid(tiny, tmp_path):
    converted(tiny, PLANS["mixed"]).save_pretrained(tmp_path)
    code = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    stock = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert stock.returncode != 0
    assert "layerboost_qwen3" in stock.stderr
    ours = subprocess.run([sys.executable, "-c", "import layerboost; " + code], capture_output=True, text=True)
    assert ours.returncode == 0, ours.stderr


def test_a_mask_of_four_dimensions_is_refused(tiny):
    with pytest.raises(ValueError, match="4 dimensions"):
        load_original(tiny)(some_tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


@torch.no_grad()
def test_embeddings_in_place_of_ids(tiny):
    hybrid = converted(tiny, PLANS["mixed"])
    tokens = some_tokens(2, 20)
    assert torch.equal(hybrid(inputs_embeds=hybrid.get_input_embeddings()(tokens)).logits, hybrid(tokens).logits)


def test_gradient_checkpointing_changes_no_gradient(tiny):
    gradients = []
    for checkpointing in (False, True):
        hybrid = converted(tiny, PLANS["mixed"]).train()
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
        tokens = some_tokens(2, 20)
        hybrid(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in hybrid.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **CLOSE)
