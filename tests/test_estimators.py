"""Cheap estimates against slow computations on the stock model, and what running them leaves behind."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerboost.analyze import estimators
from layerboost.analyze.estimators import ESTIMATORS, estimate_layers
from layerboost.data.sequences import Sequences
from layerboost.model.loading import load_original
from tests.conftest import FAMILIES
from tests.tiny import NONE, attention_of, linear, native_windows, some_tokens, visible, window

TOKENS = 14
WINDOW = 5  # narrower than every native one
NORM_AFTER = ("gemma2", "gemma3_text", "olmo2")  # families that norm what their attention gives


def data(count=3, length=TOKENS):
    """Texts of which not every token counts."""
    tokens = some_tokens(count, length)
    scored = torch.rand(count, length, generator=torch.Generator().manual_seed(1)) < 0.7
    scored[:, 0], scored[:, -1] = False, True
    return Sequences(tokens, scored)


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
    ).eval()


def layers_of(model):
    return model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h


def put(layer, plan):
    """Hooks that give a stock layer a candidate's attention."""
    attention = attention_of(layer)
    if plan.mixer == "no_attention":
        return attention.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), out[1]))

    def mask(_, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        seen = visible(x.shape[1], plan.window)
        return args, kwargs | {"attention_mask": torch.zeros(seen.shape, dtype=x.dtype).masked_fill(~seen, -1e30)}

    return attention.register_forward_pre_hook(mask, with_kwargs=True)


@torch.no_grad()
def streams_after(model, index, plans, tokens):
    """`x + A` for the layer as it is and under each plan: the stock layer on its own inputs, its MLP silent."""
    layer, given = layers_of(model)[index], {}
    with layer.register_forward_pre_hook(lambda _, args, kwargs: given.update(call=(args, kwargs)), with_kwargs=True):
        model(tokens, use_cache=False)
    args, kwargs = given["call"]
    found = []
    with layer.mlp.register_forward_hook(lambda _, __, out: torch.zeros_like(out)):
        for plan in (None, *plans):
            hook = plan and put(layer, plan)
            out = layer(*args, **kwargs)
            found.append(out[0] if isinstance(out, tuple) else out)
            if hook:
                hook.remove()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_cosine_and_reconstruction(checkpoints, family):
    sequences, plans = data(), [NONE, window(WINDOW)]
    model, slow = load_original(checkpoints[family]), stock(checkpoints[family])
    found, _ = estimate_layers(model, sequences, [plans] * 4, ["cosine", "reconstruction"], rows=2)
    for layer in (0, 3):
        full, *changed = streams_after(slow, layer, plans, sequences.tokens)
        for n, after in enumerate(changed):
            cosine = (1 - F.cosine_similarity(full, after, dim=-1)).mean(1)
            distance = (full - after).square().sum(-1).mean(1)
            assert cosine.min() > 1e-6
            np.testing.assert_allclose(found["cosine"][layer, n], cosine, rtol=1e-3)
            np.testing.assert_allclose(found["reconstruction"][layer, n], distance, rtol=1e-3)


def branch_of(family, layer):
    return layer.post_attention_layernorm if family in NORM_AFTER else attention_of(layer)


@torch.no_grad()
def finite_difference(model, family, index, plan, sequences):
    """Slope of each sequence's mean NLL, `[N]`, as a gate goes from the layer's own attention to the candidate's."""
    layer, seen = layers_of(model)[index], {}
    # large beside the rounding of softmax in float32, small enough that no token goes to another expert
    step = 1e-4 if hasattr(model.config, "num_experts_per_tok") else 1e-3
    branch = branch_of(family, layer)

    def keep(name):
        return lambda _, __, out: seen.update({name: out[0] if isinstance(out, tuple) else out})

    with branch.register_forward_hook(keep("full")):
        model(sequences.tokens, use_cache=False)
    with put(layer, plan), branch.register_forward_hook(keep("candidate")):
        model(sequences.tokens, use_cache=False)

    def nll(gate):
        mixed = (1 - gate) * seen["full"] + gate * seen["candidate"]
        with branch.register_forward_hook(lambda _, __, out: (mixed, out[1]) if isinstance(out, tuple) else mixed):
            logits = model(sequences.tokens, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), sequences.tokens[:, 1:], reduction="none")
        return torch.stack([loss[scored].mean() for loss, scored in zip(losses, sequences.scored[:, 1:], strict=True)])

    return (nll(step) - nll(-step)).abs() / (2 * step)


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_the_slope_of_the_loss(checkpoints, family):
    sequences, plans = data(), [NONE, window(WINDOW)]
    model, slow = load_original(checkpoints[family]), stock(checkpoints[family])
    found, _ = estimate_layers(model, sequences, [plans] * 4, ["taylor"], rows=2)
    for layer in (0, 3):
        for n, plan in enumerate(plans):
            slope = finite_difference(slow, family, layer, plan, sequences)
            assert slope.max() > 1e-2
            np.testing.assert_allclose(found["taylor"][layer, n], slope, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def softmax_weights(model, tokens):
    """Every layer's `[B, H, T, T]`, written out."""
    found = []
    for layer, native in zip(layers_of(model), native_windows(model.config, 4), strict=True):

        def function(module, q, k, v, mask, scaling, softcap=None, native=native, **_):
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            scores = q @ k.transpose(-1, -2) * scaling
            scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
            weights = scores.masked_fill(~visible(q.shape[2], native), float("-inf")).softmax(-1)
            found.append(weights)
            return (weights @ v).transpose(1, 2), weights

        name = f"written out, window {native}"
        ALL_ATTENTION_FUNCTIONS.register(name, function)
        attention = attention_of(layer)
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = name
    model(tokens, use_cache=False)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass(checkpoints, family):
    sequences = data()
    model = load_original(checkpoints[family])
    # per candidate, how near a key must be to count as inside
    plans = {NONE: 1, window(WINDOW): WINDOW, linear("lolcats", 3): 3, linear("gla"): 1}
    found, _ = estimate_layers(model, sequences, [list(plans)] * 4, ["attention_mass"], rows=2)
    for layer, weights in enumerate(softmax_weights(stock(checkpoints[family]), sequences.tokens)):
        for n, inside in enumerate(plans.values()):
            mass = (weights * ~visible(TOKENS, inside)).sum(-1).mean((1, 2))
            assert mass.min() > 1e-3
            np.testing.assert_allclose(found["attention_mass"][layer, n], mass, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_everything_estimates_nothing(checkpoints, family):
    sequences = data(length=8)
    model = load_original(checkpoints[family])
    found, _ = estimate_layers(model, sequences, [[window(8), NONE]] * 4, ESTIMATORS, rows=2)
    for name in ESTIMATORS:
        for layer in range(4):
            nothing, removed = found[name][layer, 0], found[name][layer, 1]
            assert np.isfinite(removed).all()
            assert removed.max() > 1e-4
            assert nothing.max() <= 1e-4 * removed.max()


@pytest.mark.parametrize("mixer", [linear("lolcats", 3), linear("gla"), linear("performer"), window(3, sink=True)])
def test_any_mixer_has_estimates(tiny, mixer):
    found, _ = estimate_layers(load_original(tiny), data(), [[mixer], [], [], [mixer]], ESTIMATORS, rows=3)
    for values in found.values():
        assert set(values) == {(0, 0), (3, 0)}
        for own in values.values():
            assert own.shape == (3,)
            assert own.dtype == np.float64
            assert np.isfinite(own).all()
            assert (own > 0).all()


def test_batches_and_cost(tiny):
    model, sequences, plans = load_original(tiny), data(5), [[NONE, window(WINDOW)]] * 4
    heard = []
    found, costs = estimate_layers(model, sequences, plans, ESTIMATORS, 2, lambda: heard.append(1))
    whole, _ = estimate_layers(model, sequences, plans, ESTIMATORS, 5)
    assert len(heard) == 3 * len(ESTIMATORS)
    for name, values in found.items():
        for place, own in values.items():
            np.testing.assert_allclose(own, whole[name][place], rtol=1e-3, atol=1e-6)
    layer = model.decoder_layers[0]
    attention = sum(p.numel() for name, p in layer.named_parameters() if name.startswith(("self_attn", "input_")))
    share = attention / sum(p.numel() for p in layer.parameters())  # one window in every layer
    expected = {"cosine": 1 + share, "taylor": 3 + share, "reconstruction": 1 + share, "attention_mass": 1}
    assert {name: cost.forwards for name, cost in costs.items()} == pytest.approx(expected)
    assert {cost.tokens for cost in costs.values()} == {5 * TOKENS}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(tiny, monkeypatch, fails):
    model, sequences = load_original(tiny), data()
    with torch.no_grad():
        before = model(sequences.tokens).logits
    implementation, learning = model.config._attn_implementation, [p.requires_grad for p in model.parameters()]
    assert implementation == "sdpa"
    assert all(learning)
    if fails:
        monkeypatch.setattr(model.final_norm, "forward", lambda _: 1 / 0)
    for name in ESTIMATORS:
        if fails:
            with pytest.raises(ZeroDivisionError):
                estimate_layers(model, sequences, [[NONE]] * 4, [name], 2)
        else:
            estimate_layers(model, sequences, [[NONE, window(WINDOW)]] * 4, [name], 2)
        assert model.config._attn_implementation == implementation
        assert [p.requires_grad for p in model.parameters()] == learning
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(sequences.tokens).logits, before)


def test_taylor_keeps_nothing_for_gradients_of_weights(tiny, monkeypatch):
    nll, learning = estimators._nll, []

    def spy(model, *args):
        learning.extend(p.requires_grad for p in model.parameters())
        return nll(model, *args)

    monkeypatch.setattr(estimators, "_nll", spy)
    estimate_layers(load_original(tiny), data(), [[NONE]] * 4, ["taylor"], 3)
    assert learning
    assert not any(learning)


def test_names_are_those_that_settings_know():
    from typing import get_args

    from layerboost.analyze import ESTIMATOR

    assert set(get_args(ESTIMATOR)) == set(ESTIMATORS) == set(estimators.ESTIMATORS_BY_NAME)
