"""The contract of a hybrid: every family x every mixer x every place, against the stock model with hooks.

A family is a row of `tiny.FAMILIES`, a plan a row of `PLANS`; every test here that takes them covers a new row.
"""

import itertools
import pickle
import shutil
import subprocess
import sys
from functools import lru_cache

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from layerboost.errors import CheckpointError, PlanError
from layerboost.layer_plan import full_plan
from layerboost.model.cache import LengthOnlyLayer, WindowLayer, cache_bytes
from layerboost.model.families import VERIFIED
from layerboost.model.hybrid import LogitsHead
from layerboost.model.loading import load_model, load_original
from tests.tiny import (
    FAMILIES,
    FULL,
    NONE,
    linear,
    make_checkpoint,
    native_windows,
    reference_logits,
    some_tokens,
    window,
)

W = 7
LOLCATS = linear("lolcats", W)
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
    "one full at the end": [NONE, window(W), NONE, FULL],
    "sinks": [window(W, sink=True), FULL, NONE, window(3, sink=True)],
    "lolcats first": [LOLCATS, FULL, FULL, FULL],
    "lolcats last": [FULL, FULL, NONE, LOLCATS],
    "lolcats all": [linear("lolcats", 3), LOLCATS, linear("lolcats", 1), LOLCATS],
    "linear": [linear("linear"), FULL, linear("lolcats", W, "elu"), linear("linear")],
    "performer": [FULL, linear("performer"), window(W), linear("performer")],
    "gla": [linear("gla"), linear("gla"), NONE, FULL],
}
NATIVE = {
    "mistral": {"sliding_window": 9},
    "qwen2": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
    "phi3": {"sliding_window": 9},
    "starcoder2": {"sliding_window": 9},
    "mixtral": {"sliding_window": 9},
    "qwen3_moe": {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
    "smollm3": {
        "sliding_window": 9, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "gpt_neox": {"use_parallel_residual": False, "num_attention_heads": 2},
}  # fmt: skip
# what is tried on three families that differ in everything: norms, windows, caps, rotary, head, experts
THREE = ("qwen3", "gemma2", "gpt_neox")
CLOSE = {"atol": 5e-5, "rtol": 2e-4}


def converted(folder, layers):
    model = load_original(folder)
    model.convert(layers)
    return model


def fitting(folder, layers):
    """The plan with linear attention only where the model has no window of its own, which it may not outlook."""
    native = native_windows(AutoConfig.from_pretrained(folder), len(layers))
    return [
        FULL if plan.mixer == "linear_attention" and own else plan for plan, own in zip(layers, native, strict=True)
    ]


@lru_cache(maxsize=64)
def hybrid_of(folder, name):
    """A hybrid whose mixers have learned something; not to be changed."""
    hybrid = load_original(folder)
    hybrid.convert(fitting(folder, PLANS[name]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in hybrid.named_parameters():
            if key.endswith(".mixer.sink"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            elif ".mixer." in key:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return hybrid


def reference(folder, name, tokens, padding=None):
    hybrid = hybrid_of(folder, name)
    mixers = {
        i: getattr(layer, hybrid.anatomy.attention)._modules.get("mixer")
        for i, layer in enumerate(hybrid.decoder_layers)
    }
    return reference_logits(folder, hybrid.plan, tokens, padding, mixers)


@pytest.fixture(scope="module")
def native_checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {family: make_checkpoint(root / family, family, **changes) for family, changes in NATIVE.items()}


def test_every_verified_family_has_a_row():
    assert set(FAMILIES) == set(VERIFIED)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_all_full_is_bit_equal_to_the_base(checkpoints, family, implementation):
    if family == "gemma2" and implementation == "sdpa":
        with pytest.raises(ValueError, match="SDPA ignores attn_logit_softcapping"):
            load_original(checkpoints[family]).set_attn_implementation("sdpa")
        return
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
@torch.no_grad()
def test_the_head_is_the_familys_own(checkpoints, family):
    """Scales and caps after the head are part of the logits."""
    hybrid = load_original(checkpoints[family])
    tokens = some_tokens(2, 20)
    hidden = hybrid.base_model(tokens).last_hidden_state
    assert torch.equal(LogitsHead(hybrid)(hidden.flatten(0, 1)), hybrid(tokens).logits.flatten(0, 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_matches_the_reference(checkpoints, family, name):
    hybrid = hybrid_of(checkpoints[family], name)
    for length in (1, W - 1, W, W + 1, 40):
        tokens = some_tokens(2, length)
        wanted = reference(checkpoints[family], name, tokens)
        torch.testing.assert_close(hybrid(tokens).logits, wanted, **CLOSE)


@pytest.mark.parametrize("family", NATIVE)
@torch.no_grad()
def test_matches_the_reference_beside_native_windows(native_checkpoints, family):
    tokens = some_tokens(2, 40)
    for layers in ([FULL, window(5), NONE, FULL], [window(5), FULL, FULL, window(9)], [NONE, FULL, window(3), NONE]):
        hybrid = converted(native_checkpoints[family], layers)
        wanted = reference_logits(native_checkpoints[family], layers, tokens)
        torch.testing.assert_close(hybrid(tokens).logits, wanted, **CLOSE)
        cache = DynamicCache(config=hybrid.config)
        found = [hybrid(part, past_key_values=cache).logits for part in tokens.split([20, 9, 1, 1, 9], 1)]
        torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_layer_with_odd_heads(tmp_path, family):
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
    folder = make_checkpoint(tmp_path, family, **sizes)
    tokens = some_tokens(2, 40)
    for plan in (NONE, window(W), window(1), window(W, sink=True), LOLCATS, linear("gla")):
        if plan.mixer == "linear_attention" and native_windows(AutoConfig.from_pretrained(folder), 1)[0]:
            continue
        hybrid = converted(folder, [plan])
        mixers = {0: getattr(hybrid.decoder_layers[0], hybrid.anatomy.attention)._modules.get("mixer")}
        wanted = reference_logits(folder, [plan], tokens, mixers=mixers)
        torch.testing.assert_close(hybrid(tokens).logits, wanted, **CLOSE)
        cache = DynamicCache(config=hybrid.config)
        found = [hybrid(part, past_key_values=cache).logits for part in tokens.split([20, 1, 19], 1)]
        torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)
        written = hybrid.generate(tokens, max_new_tokens=4, do_sample=False)
        assert torch.equal(hybrid.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False), written)


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
    hybrid = hybrid_of(checkpoints[family], name)
    tokens = some_tokens(2, 30)
    wanted = hybrid(tokens, use_cache=False).logits
    caches = itertools.cycle((lambda: None, DynamicCache, lambda: DynamicCache(config=hybrid.config)))
    for prompt, make_cache in zip((1, W - 1, W, W + 1, 20), caches, strict=False):
        found, cache = [], make_cache()
        for part in tokens.split([prompt, 3] + [1] * (27 - prompt), 1):
            out = hybrid(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)
        assert cache.get_seq_length() == 30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_left_padding_and_batches_change_nothing(checkpoints, family, name):
    hybrid = hybrid_of(checkpoints[family], name)
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
    for i in (0, 3):
        assert torch.equal(written[i, 20:], hybrid.generate(rows[i], **greedy)[0, rows[i].shape[1] :])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saves_and_opens_through_the_auto_classes(checkpoints, tmp_path, family):
    for name in ("mixed", "lolcats last", "sinks", "linear", "performer", "gla"):
        hybrid = hybrid_of(checkpoints[family], name)
        hybrid.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(again).__name__ == type(hybrid).__name__
        assert [plan.entry() for plan in again.plan] == [plan.entry() for plan in hybrid.plan]
        tokens = some_tokens(2, 30)
        assert torch.equal(again(tokens).logits, hybrid(tokens).logits)
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.model_type == f"layerboost_{family}"
        assert config.architectures == [type(hybrid).__name__]


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_static_cache(checkpoints, family, name):
    hybrid = hybrid_of(checkpoints[family], name)
    tokens = some_tokens(2, 20)
    greedy = {"max_new_tokens": 10, "do_sample": False, "min_new_tokens": 10}
    wanted = hybrid.generate(tokens, use_cache=False, **greedy)
    assert torch.equal(hybrid.generate(tokens, **greedy), wanted)
    cache = StaticCache(config=hybrid.config, max_cache_len=40)
    assert torch.equal(hybrid.generate(tokens, past_key_values=cache, **greedy), wanted)
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    wanted = hybrid.generate(tokens, attention_mask=mask, use_cache=False, **greedy)
    cache = StaticCache(config=hybrid.config, max_cache_len=40)
    assert torch.equal(hybrid.generate(tokens, attention_mask=mask, past_key_values=cache, **greedy), wanted)
    cache.reset()
    short = hybrid.generate(tokens[:, :3], use_cache=False, **greedy)
    assert torch.equal(hybrid.generate(tokens[:, :3], past_key_values=cache, **greedy), short)


@torch.no_grad()
def test_a_cache_that_was_reset_takes_another_batch(tiny):
    hybrid = load_original(tiny)
    with hybrid.mixed({0: linear("lolcats", 5), 1: NONE, 2: linear("gla"), 3: window(5)}):
        cache = DynamicCache(config=hybrid.config)
        hybrid(some_tokens(2, 20), past_key_values=cache)
        cache.reset()
        tokens = some_tokens(3, 11)
        wanted = hybrid(tokens, use_cache=False).logits
        found = [hybrid(part, past_key_values=cache).logits for part in tokens.split([7, 4], 1)]
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixed", "window all", "sinks", "lolcats all", "gla"])
@torch.no_grad()
def test_a_mask_as_long_as_a_static_cache(tiny, name):
    """It says where padding is from the first token on, and of tokens that are still to come."""
    hybrid = hybrid_of(tiny, name)
    tokens = some_tokens(2, 24)
    mask = torch.zeros(2, 40, dtype=torch.long)
    mask[0, :24], mask[1, 5:24] = 1, 1
    positions = (mask[:, :24].cumsum(-1) - 1).clamp(min=0)
    wanted = hybrid(tokens, attention_mask=mask[:, :24], position_ids=positions, use_cache=False).logits
    cache, found = StaticCache(config=hybrid.config, max_cache_len=40), []
    for start, end in ((0, 20), (20, 21), (21, 24)):
        step = {"attention_mask": mask, "position_ids": positions[:, start:end], "past_key_values": cache}
        found.append(hybrid(tokens[:, start:end], **step).logits)
    there = mask[:, :24].bool()
    torch.testing.assert_close(torch.cat(found, 1)[there], wanted[there], **CLOSE)


@pytest.mark.parametrize("name", ["mixed", "window all", "window of 1", "sinks"])
@torch.no_grad()
def test_assisted_decoding_takes_tokens_back(tiny, name):
    hybrid = hybrid_of(tiny, name)
    tokens = some_tokens(1, 12).repeat(1, 2)
    greedy = {"max_new_tokens": 16, "do_sample": False}
    wanted = hybrid.generate(tokens, **greedy)
    assert torch.equal(hybrid.generate(tokens, prompt_lookup_num_tokens=3, **greedy), wanted)
    assert torch.equal(hybrid.generate(tokens, assistant_model=hybrid_of(tiny, "none last"), **greedy), wanted)


def test_linear_attention_cannot_take_tokens_back(tiny):
    with pytest.raises(ValueError, match="cannot take tokens back"):
        hybrid_of(tiny, "gla").generate(some_tokens(1, 12).repeat(1, 2), prompt_lookup_num_tokens=3, max_new_tokens=16)


def test_attention_weights_are_not_made_up(tiny):
    with pytest.raises(ValueError, match="output_attentions"):
        hybrid_of(tiny, "mixed")(some_tokens(1, 8), output_attentions=True)
    assert len(hybrid_of(tiny, "mixed")(some_tokens(1, 8), output_hidden_states=True).hidden_states) == 5


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", PLANS)
@torch.no_grad()
def test_beam_search_with_and_without_cache(checkpoints, family, name):
    hybrid = hybrid_of(checkpoints[family], name)
    beams = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    tokens = some_tokens(2, 12)
    assert torch.equal(hybrid.generate(tokens, **beams), hybrid.generate(tokens, use_cache=False, **beams))


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", ["mixed", "sinks", "lolcats all", "linear", "gla", "performer"])
@torch.no_grad()
def test_bf16_stays_near_float32(checkpoints, tmp_path, family, name):
    exact = hybrid_of(checkpoints[family], name)
    hybrid = load_original(checkpoints[family], dtype=torch.bfloat16)
    hybrid.convert(exact.plan)
    hybrid.load_state_dict(exact.state_dict())
    tokens = some_tokens(2, 40)
    logits, wanted = hybrid(tokens).logits, exact(tokens).logits
    assert logits.dtype == torch.bfloat16
    base = load_original(checkpoints[family])
    untouched = base(tokens).logits
    off = (base.to(torch.bfloat16)(tokens).logits.float() - untouched).abs().mean() / untouched.abs().mean()
    assert (logits.float() - wanted).abs().mean() / wanted.abs().mean() < 3 * off  # as near as the original comes
    hybrid.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in hybrid.state_dict().items())
    torch.testing.assert_close(again(tokens).logits, logits)


@pytest.mark.skipif(
    shutil.which("gcc") is None and shutil.which("c++") is None, reason="torch.compile needs a compiler"
)
@pytest.mark.parametrize(
    ("family", "name"),
    [("qwen3", "mixed"), ("qwen3", "lolcats last"), pytest.param("gemma2", "sinks", marks=pytest.mark.slow),
     pytest.param("gpt_neox", "gla", marks=pytest.mark.slow)],
)  # fmt: skip
@torch.no_grad()
def test_compiled_equals_eager(checkpoints, family, name):
    torch.compiler.reset()
    hybrid = hybrid_of(checkpoints[family], name)
    compiled = torch.compile(hybrid, dynamic=True)
    tokens = some_tokens(2, 40)
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, hybrid(tokens).logits, **CLOSE)
    wanted = hybrid(tokens, use_cache=False).logits
    cache = StaticCache(config=hybrid.config, max_cache_len=40)
    found = [hybrid(tokens[:, :30], past_key_values=cache).logits]
    mask, positions = torch.ones(2, 40, dtype=torch.long), torch.arange(40)[None]
    for i in range(30, 34):
        step = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        found.append(compiled(tokens[:, i : i + 1], past_key_values=cache, **step).logits)
    torch.testing.assert_close(torch.cat(found, 1), wanted[:, :34], **CLOSE)


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", ["mixed", "sinks", "lolcats all", "gla"])
def test_gradient_checkpointing_changes_no_gradient(checkpoints, family, name):
    gradients = []
    for checkpointing in (False, True):
        exact = hybrid_of(checkpoints[family], name)
        hybrid = converted(checkpoints[family], exact.plan).train()
        hybrid.load_state_dict(exact.state_dict())
        if checkpointing:
            hybrid.gradient_checkpointing_enable()
        tokens = some_tokens(2, 20)
        hybrid(tokens, labels=tokens).loss.backward()
        gradients.append({key: p.grad for key, p in hybrid.named_parameters()})
    for key, gradient in gradients[0].items():
        assert gradient is not None, key
        torch.testing.assert_close(gradients[1][key], gradient, **CLOSE)
    learned = [key for key in gradients[0] if ".mixer." in key]
    assert all(gradients[0][key].abs().max() > 0 for key in learned if not key.endswith("gate_down"))


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("name", ["mixed", "sinks", "lolcats last"])
@torch.no_grad()
def test_adapters_merge(checkpoints, family, name):
    exact = hybrid_of(checkpoints[family], name)
    hybrid = converted(checkpoints[family], exact.plan)
    hybrid.load_state_dict(exact.state_dict())
    adapted = peft.get_peft_model(hybrid, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tokens = some_tokens(2, 30)
    with_adapter = adapted(tokens).logits
    assert (with_adapter - exact(tokens).logits).abs().max() > 0.01
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(tokens).logits, exact(tokens).logits)
    torch.testing.assert_close(adapted.merge_and_unload()(tokens).logits, with_adapter, **CLOSE)


def test_flash_attention_is_handed_the_window(tiny, monkeypatch):
    """On a machine without it: what it would be called with."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def flash(module, q, k, v, mask, **kwargs):
        calls.append((mask, kwargs))
        assert module.config._attn_implementation == "flash_attention_2"  # by which it finds its kernel
        return torch.zeros_like(q).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    hybrid = converted(tiny, [FULL, window(W), window(3), window(5, sink=True)])
    hybrid.config._attn_implementation = "flash_attention_2"
    tokens, mask = some_tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    hybrid(tokens, attention_mask=mask)
    assert [kwargs["sliding_window"] for _, kwargs in calls[1:]] == [W, 3]
    assert [layer.self_attn.config._attn_implementation for layer in hybrid.decoder_layers[1:]] == ["layerboost"] * 3
    assert torch.equal(calls[1][0], mask.bool())


@torch.no_grad()
def test_packed_sequences_do_not_see_one_another(tiny):
    """As in training on packed rows: positions begin anew at each sequence."""
    rows = [some_tokens(1, length, seed=length) for length in (12, 20, 8)]
    packed = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    for name in ("window all", "mixed", "sinks"):
        hybrid = hybrid_of(tiny, name)
        alone = torch.cat([hybrid(row).logits for row in rows], 1)
        for use_cache in (False, None, True):  # which stock models heed, and then let sequences see one another
            together = hybrid(packed, position_ids=positions, use_cache=use_cache).logits
            torch.testing.assert_close(together, alone, **CLOSE)
    for use_cache in (False, None):
        with pytest.raises(ValueError, match="linear_attention takes one sequence per row"):
            hybrid_of(tiny, "lolcats all")(packed, position_ids=positions, use_cache=use_cache)


@torch.no_grad()
def test_a_fresh_sink_changes_little(tiny):
    """It takes exp(-10) beside scores: at most 5e-5 of a softmax whose largest score is 0, less of a peaked one."""
    tokens = some_tokens(2, 40)
    without, with_sinks = (converted(tiny, [window(W, sink=sink)] * 4)(tokens).logits for sink in (False, True))
    assert 0 < (without - with_sinks).abs().max() < 1e-2


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
    with pytest.raises(PlanError, match="layer 0: window 257 is wider than the model's context of 256"):
        converted(tiny, [window(257), FULL, FULL, FULL])
    with pytest.raises(PlanError, match="layer 1: linear_attention looks further back"):
        converted(native_checkpoints["mistral"], [FULL, linear("gla"), FULL, FULL])


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
        hybrid_of(tiny, "mixed")(some_tokens(1, 4), attention_mask=torch.zeros(1, 1, 4, 4))


@torch.no_grad()
def test_embeddings_in_place_of_ids(tiny):
    hybrid = converted(tiny, PLANS["mixed"])
    tokens = some_tokens(2, 20)
    assert torch.equal(hybrid(inputs_embeds=hybrid.get_input_embeddings()(tokens)).logits, hybrid(tokens).logits)


def test_configurations_are_handed_to_other_processes(tmp_path):
    """Engines that start workers pickle the configuration, and find its class by name."""
    folder = make_checkpoint(tmp_path / "base", "gemma3_text")
    model = load_original(folder)
    model.convert([NONE, window(5), FULL, FULL])
    again = pickle.loads(pickle.dumps(model.config))
    assert type(again) is type(model.config)
    assert again.to_dict() == model.config.to_dict()
