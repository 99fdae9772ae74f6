"""Operators against written-out references: outputs and gradients, at the edges of windows, blocks and chunks."""

import contextlib

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from layerboost.model import kernels
from layerboost.model.mixers import flex_mask
from layerboost.model.operators import (
    LOG_DECAY_MIN,
    PADDING,
    causal_kernel_sum,
    gated_kernel_sum,
    sliding_window_attention,
    window_and_kernel_attention,
)

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def draw(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def qkv(queries, keys, heads=6, groups=2, size=8, batch=2, values=5):
    return (
        draw(batch, heads, queries, size),
        draw(batch, groups, keys, size, seed=1),
        draw(batch, groups, keys, values, seed=2),
    )


def seen_mask(queries, keys, window):
    """`[T, S]`: the query at position p sees keys k with p - W < k <= p."""
    position = torch.arange(keys - queries, keys)[:, None]
    key = torch.arange(keys)[None]
    return (position - window < key) & (key <= position)


def masked_softmax(q, k, v, window, scale=None, segments=None, softcap=None, sink=None):
    """The quadratic reference."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = seen_mask(q.shape[2], k.shape[2], window)[None, None]
    if segments is not None:
        seen = seen & (segments[:, None, k.shape[2] - q.shape[2] :, None] == segments[:, None, None, :])
    weights = scores.masked_fill(~seen, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + sink.exp()[None, :, None, None]
    return weights / total @ v


def assert_same(ours, theirs, inputs):
    """Outputs and every gradient."""
    torch.testing.assert_close(ours, theirs, **CLOSE)
    pull = draw(*theirs.shape, seed=9, grad=False).to(theirs.dtype)
    got = torch.autograd.grad((ours * pull).sum(), inputs, retain_graph=True, allow_unused=True)
    wanted = torch.autograd.grad((theirs * pull).sum(), inputs, allow_unused=True)
    for given, *both in zip(inputs, got, wanted, strict=True):
        # where an input has no influence, one of the two may have no graph to it
        torch.testing.assert_close(*(torch.zeros_like(given) if g is None else g for g in both), **CLOSE)


SIZES = [(1, 1), (1, 9), (5, 12), (16, 16), (40, 46), (65, 65), (66, 70), (130, 130), (300, 330)]


@pytest.mark.parametrize("window", [1, 2, 7, 16, 64, 100, 400])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
def test_sliding_window_equals_the_mask(window, queries, keys):
    q, k, v = qkv(queries, keys)
    assert_same(sliding_window_attention(q, k, v, window=window), masked_softmax(q, k, v, window), (q, k, v))


@pytest.mark.parametrize("window", [1, 7, 64, 600])
@pytest.mark.parametrize(("queries", "keys"), [(1_024, 1_024), (1_025, 1_031), (2_100, 2_100)])
def test_long_sequences_are_taken_span_by_span(window, queries, keys):
    q, k, v = qkv(queries, keys, heads=2, groups=1, batch=2)
    segments = torch.zeros(2, keys, dtype=torch.long)
    segments[1, keys - queries + 900 :] = 1
    for given in (None, segments):
        ours, theirs = (
            sliding_window_attention(q, k, v, window=window, segments=given),
            masked_softmax(q, k, v, window, segments=given),
        )
        assert_same(ours, theirs, (q, k, v))


@pytest.mark.parametrize("window", [1, 7, 64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 7), (40, 46), (130, 130), (300, 330)])
@pytest.mark.parametrize("options", ["softcap", "sink", "scale", "segments", "all"])
def test_sliding_window_with_everything(window, queries, keys, options):
    q, k, v = qkv(queries, keys)
    segments = torch.zeros(2, keys, dtype=torch.long)
    segments[0, : keys // 3] = PADDING
    segments[1, keys // 2 :] = 1
    sink = draw(6, seed=4)
    every = {"softcap": 2.0, "sink": sink, "scale": 0.7, "segments": segments}
    chosen = every if options == "all" else {options: every[options]}
    inputs = (q, k, v, sink) if "sink" in chosen else (q, k, v)
    ours, theirs = sliding_window_attention(q, k, v, window=window, **chosen), masked_softmax(q, k, v, window, **chosen)
    assert_same(ours, theirs, inputs)


def test_a_window_one_wider_or_narrower_is_noticed():
    q, k, v = qkv(130, 130)
    wanted = masked_softmax(q, k, v, 16)
    for other in (15, 17):
        assert (sliding_window_attention(q, k, v, window=other) - wanted).abs().max() > 0.01


@torch.no_grad()
def test_dropout_is_that_of_the_weights():
    q, k, v = qkv(200, 200)
    torch.manual_seed(0)
    outs = [
        sliding_window_attention(q, k, v, window=16, dropout=0.5, softcap=cap)
        for cap in (None, 1e6)
        for _ in range(400)
    ]
    wanted = masked_softmax(q, k, v, 16)
    for some in (outs[:400], outs[400:]):
        assert (some[0] - some[1]).abs().max() > 0.1
        assert (torch.stack(some).mean(0) - wanted).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window must be at least 1, found 0"),
        ({"heads": 5}, "5 heads are not a multiple of 2"),
        ({"queries": 20}, "20 queries need as many keys, found 10"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    q, k, v = qkv(change.get("queries", 10), 10, heads=change.get("heads", 6))
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, k, v, window=change.get("window", 4))


def test_bf16_keeps_its_dtype():
    q, k, v = (t.bfloat16() for t in qkv(100, 100))
    for extra in ({}, {"sink": torch.zeros(6)}):
        out = sliding_window_attention(q, k, v, window=16, **extra)
        assert out.dtype == torch.bfloat16
        wanted = masked_softmax(q.float(), k.float(), v.float(), 16, **extra)
        torch.testing.assert_close(out.float(), wanted, atol=0.03, rtol=0.03)


@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (40, 46), (130, 130)])
@pytest.mark.parametrize("with_segments", [False, True])
@torch.no_grad()
def test_the_mask_for_flex_attention_is_the_window(queries, keys, with_segments):
    q, k, v = qkv(queries, keys, size=16)
    q, k, v = q.detach(), k.detach(), k.detach() * 2 + 1
    segments = torch.zeros(2, keys, dtype=torch.long)
    segments[0, : keys // 3] = PADDING
    given = segments if with_segments else None
    wide_k, wide_v = (t.repeat_interleave(3, 1) for t in (k, v))
    ours = flex_attention(q, wide_k, wide_v, block_mask=flex_mask(q, k, 7, given))
    torch.testing.assert_close(ours, sliding_window_attention(q, k, v, window=7, segments=given), **CLOSE)


def kernel_reference(q, k, v, fq, fk, window, share, segments=None, softcap=None):
    """Every weight `[B, H, T, S]` written out."""
    ratio = q.shape[1] // k.shape[1]
    k, v, fk = (t.repeat_interleave(ratio, 1) for t in (k, v, fk))
    near = (
        seen_mask(q.shape[2], k.shape[2], window) if window else torch.zeros(q.shape[2], k.shape[2], dtype=torch.bool)
    )
    causal = seen_mask(q.shape[2], k.shape[2], k.shape[2] + 1)
    there = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    if segments is not None:
        there = (segments >= 0)[:, None, None, :]
        # a padded query still looks at padding within its window
        same = segments[:, None, k.shape[2] - q.shape[2] :, None] == segments[:, None, None, :]
        near = near & same
    weights = fq @ fk.transpose(-1, -2) * (causal & ~seen_mask(q.shape[2], k.shape[2], window) if window else causal)
    weights = weights * there
    if window:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        top = scores.masked_fill(~near, float("-inf")).amax(-1, keepdim=True)
        share = share[None, :, None, None]
        weights = share * ((scores - top) * near).exp() * near + (1 - share) * weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0) @ v


@pytest.mark.parametrize("window", [0, 1, 7, 20, 64])
@pytest.mark.parametrize("tokens", [1, 6, 7, 8, 63, 64, 65, 200])
def test_window_and_kernel_attention_equals_all_weights(window, tokens):
    q, k, v = qkv(tokens, tokens)
    fq, fk = draw(2, 6, tokens, 9, seed=5), draw(2, 2, tokens, 9, seed=6)
    share = torch.sigmoid(draw(6, seed=7))
    segments = torch.zeros(2, tokens, dtype=torch.long)
    segments[0, : tokens // 3] = PADDING
    for given, softcap in ((None, None), (segments, None), (None, 2.0)):
        ours, _ = window_and_kernel_attention(
            q, k, v, fq.exp(), fk.exp(), window=window, share=share, segments=given, softcap=softcap
        )
        theirs = kernel_reference(q, k, v, fq.exp(), fk.exp(), window, share, given, softcap)
        assert_same(ours, theirs, (q, k, v, fq, fk))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 200])
def test_chunked_sums_equal_recurrences(tokens):
    """Forward, gradient and final state, from a state and from none; in float64, for a recurrence of many steps."""
    shapes = ((2, 2, 3, tokens, 6), (2, 2, tokens, 6), (2, 2, tokens, 5), (2, 2, tokens, 6), (2, 2, 6, 5))
    q, k, v, gate, start = (
        draw(*shape, seed=i, grad=False).double().requires_grad_() for i, shape in enumerate(shapes)
    )
    for first in (None, start):
        for gated in (False, True):
            decay = LOG_DECAY_MIN * torch.sigmoid(gate)
            state = torch.zeros(2, 2, 6, 5).double() if first is None else first
            outs = []
            for t in range(tokens):
                if gated:
                    state = decay[:, :, t].exp()[..., None] * state
                state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
                outs.append(torch.einsum("bgrf,bgfd->bgrd", q[:, :, :, t], state))
            theirs = torch.stack(outs, 3)
            ours, final = (
                gated_kernel_sum(q, k, v, decay, state=first) if gated else causal_kernel_sum(q, k, v, state=first)
            )
            assert_same(ours, theirs, (q, k, v, gate, start))
            torch.testing.assert_close(final, state, **CLOSE)


def test_the_strongest_decay_stays_finite():
    q, k, v = draw(1, 1, 1, 64, 4), draw(1, 1, 64, 4, seed=1), draw(1, 1, 64, 3, seed=2)
    out, state = gated_kernel_sum(q, k, v, torch.full((1, 1, 64, 4), LOG_DECAY_MIN))
    assert torch.isfinite(out).all()
    assert torch.isfinite(state).all()


@pytest.mark.parametrize("window", [0, 5])
@torch.no_grad()
def test_a_state_goes_on_where_it_was(window):
    """In pieces of any length, with the window's keys kept in between."""
    q, k, v = qkv(90, 90)
    fq, fk = draw(2, 6, 90, 9, seed=5).exp(), draw(2, 2, 90, 9, seed=6).exp()
    share = torch.full((6,), 0.7)
    wanted, _ = window_and_kernel_attention(q, k, v, fq, fk, window=window, share=share)
    found, state, start = [], None, 0
    for piece in (1, 3, 30, 1, 1, 54):
        end, kept = start + piece, max(0, start - window)
        out, state = window_and_kernel_attention(
            q[:, :, start:end], k[:, :, kept:end], v[:, :, kept:end], fq[:, :, start:end], fk[:, :, kept:end],
            window=window, share=share, state=state,
        )  # fmt: skip
        found.append(out)
        start = end
    torch.testing.assert_close(torch.cat(found, 2), wanted, **CLOSE)


def by_documented_layout(q, k, v, g, scale, initial_state, output_final_state):
    """What flash-linear-attention's `chunk_gla` is documented to compute: `[B, T, H, K]`, one state per head."""
    assert output_final_state
    state = torch.zeros(q.shape[0], q.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state
    outs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t] * scale, state))
    return torch.stack(outs, 1), state


def test_the_gated_kernel_is_called_in_its_own_layout():
    kernel = kernels.adapted(by_documented_layout)
    for first_use in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        with first_use():
            kernels._prove(kernel, gated_kernel_sum, "cpu")
    q, k, v = draw(2, 2, 3, 20, 6), draw(2, 2, 20, 6, seed=1), draw(2, 2, 20, 5, seed=2)
    decay = -torch.rand(2, 2, 20, 6)
    for ours, theirs in zip(kernel(q, k, v, decay), gated_kernel_sum(q, k, v, decay), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_kernel_that_computes_something_else_is_left_alone(monkeypatch):
    def wrong(*args, **kwargs):
        out, state = by_documented_layout(*args, **kwargs)
        return out * 1.05, state

    with pytest.raises(ValueError, match="does not compute what plain code computes"):
        kernels._prove(kernels.adapted(wrong), gated_kernel_sum, "cpu")
    assert kernels.gated_kernel("cpu", gated_kernel_sum) is None
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match="flash-linear-attention is not used"):
        assert kernels.gated_kernel("cuda", gated_kernel_sum) is None  # it is not there after all
    kernels.gated_kernel.cache_clear()
