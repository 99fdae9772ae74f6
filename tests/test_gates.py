"""The gates planner: the mixture against whole plans, its gradient, what it leaves behind, and what it learns."""

import itertools
import math

import pytest
import torch

from layerboost.data.sequences import Sequences
from layerboost.errors import PlanError
from layerboost.knapsack import Option, solve
from layerboost.model.hybrid import LogitsHead
from layerboost.model.loading import load_original
from layerboost.plan.gates import _rows, divergence, gate_losses, gated, learn_gates, set_gates
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, linear, native_windows, some_tokens, window

WEIGHTS = {"text_kl": 0.6, "recall_kl": 0.4}
SHARES = [0.25, 0.0, 0.02]
CANDIDATES = [[NONE, window(4)]] * 4


def some_data():
    """Text, and two kinds of probes, one of another length, scored at their end."""
    found = {}
    for seed, (kind, rows, length) in enumerate((("text", 6, 24), ("copy", 4, 24), ("needle", 4, 32))):
        scored = torch.zeros(rows, length, dtype=torch.bool)
        scored[:, 1 if kind == "text" else -4 :] = True
        found[kind] = Sequences(some_tokens(rows, length, seed), scored)
    return found


def learn(model, target=0.75, steps=30, seed=0, **kwargs):
    return learn_gates(
        model, some_data(), CANDIDATES, [SHARES] * 4, target, WEIGHTS, steps=steps, batch=2, seed=seed, **kwargs
    )


def rounded(gates, target):
    choices = [
        Option(layer, plan, loss, share)
        for layer, losses in enumerate(gate_losses(gates))
        for plan, loss, share in zip([FULL, *CANDIDATES[layer]], [0.0, *losses], SHARES, strict=True)
    ]
    return solve(choices, 4, minimise="loss", kv=target)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_hot_gates_are_the_plan(checkpoints, family):
    model, tokens = load_original(checkpoints[family]), some_tokens(2, 24)
    native = native_windows(model.config, 4)
    own = [[NONE, window(5), *([] if native[i] else [linear("gla"), linear("lolcats", 5)])] for i in range(4)]
    plans = [{i: plan} for i in (0, 3) for plan in own[i]] + [{}, {0: NONE, 1: window(5), 3: own[3][-1]}]
    expected = []
    for plan in plans:
        with model.mixed(plan):
            expected.append(model(tokens, use_cache=False).logits)
    with gated(model, own) as layers:
        for plan, logits in zip(plans, expected, strict=True):
            for i, layer in enumerate(layers):
                layer.gates = torch.eye(1 + len(own[i]))[[FULL, *own[i]].index(plan.get(i, FULL))]
            torch.testing.assert_close(model(tokens, use_cache=False).logits, logits, atol=1e-4, rtol=1e-4)
        layers[0].gates = torch.tensor([0.5, 0.5] + [0.0] * (len(own[0]) - 1))
        for i in (1, 2, 3):
            layers[i].gates = torch.eye(1 + len(own[i]))[0]
        half = model(tokens, use_cache=False).logits
    assert (half - expected[-2]).abs().max() > 0.01, "a norm after the attention undoes its gate"


def test_gradient_against_differences(tiny):
    model = load_original(tiny)
    head, rows = LogitsHead(model), _rows(model, some_data(), False)
    start = [torch.linspace(0.5, -0.5, 3) + 0.1 * i for i in range(4)]
    with gated(model, CANDIDATES) as layers:

        def loss(logits):
            set_gates(layers, logits)
            return divergence(model, head, rows)

        logits = [own.clone().requires_grad_() for own in start]
        found = torch.autograd.grad(loss(logits), logits)
        for layer, gate in itertools.product((0, 3), range(3)):
            moved = []
            for step in (0.02, -0.02):
                shifted = [own.clone() for own in start]
                shifted[layer][gate] += step
                moved.append(loss(shifted).item())
            difference = (moved[0] - moved[1]) / 0.04
            assert found[layer][gate].item() == pytest.approx(difference, rel=0.01, abs=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "olmo2", "gpt_neox"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(checkpoints, family, fails):
    model = load_original(checkpoints[family])
    next(model.parameters()).requires_grad_(False)

    def state():
        modules = [(name, id(m), type(m), list(vars(m)), list(m._modules)) for name, m in model.named_modules()]
        return modules, [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()], model.plan

    def advance(**_):
        if fails:
            raise KeyboardInterrupt

    before, weights = state(), {name: p.clone() for name, p in model.state_dict().items()}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            learn(model, steps=2, advance=advance)
    else:
        learn(model, steps=2, advance=advance)
    assert state() == before
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())


def test_useless_attention_goes_first(tiny):
    model = load_original(tiny)
    with torch.no_grad():
        model.decoder_layers[2].self_attn.o_proj.weight.zero_()
    seen = []
    gates, tokens = learn(model, steps=60, advance=lambda note: seen.append(note))
    assert max(gates[2]) == gates[2][1]  # a window there is as harmless, and dearer
    assert all(own[0] > 0.9 for i, own in enumerate(gates) if i != 2)
    assert len(seen) == 60
    costs = [float(note.split()[3]) for note in seen]  # "KL 0.123  cost 0.45 of 0.75"
    assert max(costs[-5:]) < 0.77 < costs[0]
    assert rounded(gates, 0.75) == [FULL, FULL, NONE, FULL]
    assert 60 * 2 * (24 + 24) <= tokens <= 60 * 2 * (24 + 32)


def test_seed_decides(tiny):
    model = load_original(tiny)
    once, again, other = (learn(model, target=0.4, steps=6, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once[0] != other[0]
    assert all(sum(own) == pytest.approx(1) for own in once[0])


def test_text_and_recall_are_told_apart(tiny):
    model, data = load_original(tiny), some_data()
    assert len(_rows(model, data, True)) == 6
    for (tokens, _, teacher), row in zip(
        _rows(model, data, False), (*data["copy"].tokens, *data["needle"].tokens), strict=True
    ):
        assert torch.equal(tokens, row)
        with torch.no_grad():
            torch.testing.assert_close(teacher, model.base_model(row[None]).last_hidden_state[0, -5:-1])
    settings = {"steps": 2, "batch": 2, "seed": 0}
    text = {"text": data["text"]}
    learn_gates(model, text, CANDIDATES, [SHARES] * 4, 0.5, {"text_kl": 1.0, "recall_kl": 0.0}, **settings)
    with pytest.raises(PlanError, match="data is text"):
        learn_gates(model, text, CANDIDATES, [SHARES] * 4, 0.5, WEIGHTS, **settings)


def test_rounding_is_the_likeliest_plan_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    for target in (0.1, 0.3, 0.55, 1.0):
        gates = (3 * torch.randn(4, 3, generator=generator)).softmax(-1).tolist()
        found = rounded(gates, target)
        within = [c for c in itertools.product(range(3), repeat=4) if sum(SHARES[i] for i in c) <= target]
        best = max(within, key=lambda c: math.prod(own[i] for own, i in zip(gates, c, strict=True)))
        assert found == [[FULL, NONE, window(4)][i] for i in best]
    assert all(math.isfinite(x) for x in gate_losses([[1.0, 0.0], [0.0, 1.0]])[0])
