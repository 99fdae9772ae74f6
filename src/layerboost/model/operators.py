"""Attention operators whose time and memory are linear in the sequence, as pure functions.

B batch, T query length, S key length, H heads, G key/value heads, R = H / G, D head size, W window, F features,
N blocks, C queries of a block, M keys of a block.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from layerboost.model.kernels import gated_kernel

# Segment numbers: a query sees a key of the same segment. Users' padding is PADDING; the rest fills up blocks.
PADDING, _RIGHT, _LEFT = -1, -2, -3

_SPAN = {"cpu": 1_024}  # queries that windows work on at once, to stay in a processor's cache
_LONGEST_SPAN = 16_384
_CHUNK = 64  # tokens that linear attention takes together
_GATED_CHUNK = 16
LOG_DECAY_MIN = -5.0  # a step's least log decay: over a chunk exp(16 * 5) still fits float32


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    segments: Tensor | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal softmax attention in which each query sees the last `window` keys, itself included.

    Time and memory are linear in T for a fixed window, forward and backward.

    Args:
        q: `[B, H, T, D]`, floating; rotary embedding already applied.
        k, v: `[B, G, S, D]` with H a multiple of G and S >= T; the queries are those of the last T keys.
        scale: of the scores; None is `D ** -0.5`.
        segments: `[B or 1, S]` integers; a query sees only keys of its own segment. None is one segment.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sink: `[H]`, a logit per head that takes its share of the softmax and gives nothing (gpt-oss).
        dropout: of the attention weights.

    Returns:
        `[B, H, T, D]` in q's dtype; equal to full causal attention when `window >= S`.

    Raises:
        ValueError: `window < 1`, H is not a multiple of G, or S < T.

    Source: arXiv 2004.05150 section 3.1; sinks: arXiv 2508.10925 section 2.2.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = softcap is None and sink is None
    if plain and segments is None and 1 < q.shape[2] == k.shape[2] <= window:
        _check(q, k, window)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scale)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if plain:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        scores = _scores(q, k, mask, scale, softcap)
        if sink is not None:
            rows = scores.shape[-2] // (sink.numel() // scores.shape[1])
            column = sink.float().view(1, scores.shape[1], -1, 1).repeat_interleave(rows, 2)
            scores = torch.cat([scores, column.expand(*scores.shape[:-1], 1)], -1)
        weights = F.dropout(scores.softmax(-1), dropout)[..., : k.shape[-2]]
        return weights.to(v.dtype) @ v

    return _over_blocks(q, k, v, window, segments, attend)


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if mask is None else scores.masked_fill(~mask, float("-inf"))


def _check(q: Tensor, k: Tensor, window: int) -> None:
    if window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads are not a multiple of {k.shape[1]} key/value heads")
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"{q.shape[2]} queries need as many keys, found {k.shape[2]}")


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _over_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor | None, attend: Attend) -> Tensor:
    """Attend within the window, span by span, so that what is held in between stays small and in fast memory.

    `attend` gets queries `[B * N, G, R * C, D]`, keys and values `[B * N, G, M, D]` and a mask `[B * N, 1, R * C, M]`,
    True where visible, or None where everything is; every query sees itself. It returns `[B * N, G, R * C, X]`.

    Returns:
        `[B, H, T, X]`.
    """
    _check(q, k, window)
    past, span = k.shape[2] - q.shape[2], max(_SPAN.get(q.device.type, _LONGEST_SPAN), 2 * window)
    if q.shape[2] <= span:
        return _over_span(q, k, v, window, segments, attend)
    # split, and not slices of the whole: the backward pass of each slice would fill a tensor of the whole length
    sizes = [past, *[span] * (q.shape[2] // span), q.shape[2] % span]
    (near_k, *all_k), (near_v, *all_v) = k.split(sizes, 2), v.split(sizes, 2)
    end, parts = past, []
    for query, key, value in zip(q.split(sizes[1:], 2), all_k, all_v, strict=True):
        kept = min(window - 1, near_k.shape[2])
        near_k = torch.cat([near_k[:, :, near_k.shape[2] - kept :], key], 2)
        near_v = torch.cat([near_v[:, :, near_v.shape[2] - kept :], value], 2)
        end += query.shape[2]
        here = None if segments is None else segments[:, end - near_k.shape[2] : end]
        if query.shape[2]:
            parts.append(_over_span(query, near_k, near_v, window, here, attend).transpose(1, 2))
    return torch.cat(parts, 1).transpose(1, 2)


def _over_span(q: Tensor, k: Tensor, v: Tensor, window: int, segments: Tensor | None, attend: Attend) -> Tensor:
    """Block by block, all blocks at once."""
    batch, heads, queries, size = q.shape
    groups = k.shape[1]
    kept = min(k.shape[2], queries + window - 1)
    k, v = k[:, :, k.shape[2] - kept :], v[:, :, v.shape[2] - kept :]
    past = kept - queries
    if segments is not None:
        segments = segments[:, segments.shape[1] - kept :]
    if queries <= max(window, 64):  # one block
        block, earlier, blocks = queries, 1, 1
        left = right = 0
        earlier_tokens = past
    else:
        block = min(max(window // 4, 32), 128)  # the fastest of 32 to 256 at windows of 16 to 1,024
        earlier = -(-(window - 1) // block)
        blocks = -(-queries // block)
        earlier_tokens = earlier * block
        left, right = earlier_tokens - past, blocks * block - queries
    if segments is None and (left or right):
        segments = torch.zeros(1, kept, dtype=torch.long, device=q.device)

    def cut(x: Tensor) -> Tensor:
        """`[B, G, S, D]` to `[B * N, G, M, D]`; by concatenation, whose backward pass is linear in S."""
        if blocks == 1:
            return x
        pieces = F.pad(x, (0, 0, left, right)).unflatten(2, (-1, block))
        joined = torch.cat([pieces[:, :, i : i + blocks] for i in range(earlier + 1)], 3)
        return joined.transpose(1, 2).flatten(0, 1)

    mask = _block_mask(window, segments, blocks, block, earlier_tokens, left, right, q.device)
    if mask is not None:
        mask = mask.expand(batch, blocks, -1, -1).flatten(0, 1)[:, None]
        mask = mask.repeat(1, 1, heads // groups, 1)
    padded = F.pad(q, (0, 0, 0, right)).view(batch, groups, heads // groups, blocks, block, size)
    rows = padded.permute(0, 3, 1, 2, 4, 5).reshape(batch * blocks, groups, -1, size)
    out = attend(rows, cut(k), cut(v), mask)
    # in memory by token, as the output projection takes it
    out = out.view(batch, blocks, groups, heads // groups, block, -1).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(batch, blocks * block, heads, -1)[:, :queries].transpose(1, 2)


def _block_mask(
    window: int,
    segments: Tensor | None,
    blocks: int,
    block: int,
    earlier: int,
    left: int,
    right: int,
    device: torch.device,
) -> Tensor | None:
    """`[B or 1, N, C, M]`, True where a query of a block sees one of its keys; None where all do."""
    if segments is None and block == 1 and earlier < window:
        return None
    keys = torch.arange(-earlier, block, device=device)[None]
    queries = torch.arange(block, device=device)[:, None]
    band = ((keys <= queries) & (keys > queries - window))[None, None]
    if segments is None:
        return band
    whole = F.pad(F.pad(segments, (left, 0), value=_LEFT), (0, right), value=_RIGHT)
    of_keys = whole.unfold(1, earlier + block, block)[:, :blocks]
    of_queries = of_keys[..., earlier:]
    return band & (of_queries[..., :, None] == of_keys[..., None, :])


def window_and_kernel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features_q: Tensor,
    features_k: Tensor,
    *,
    window: int,
    share: Tensor | None = None,
    scale: float | None = None,
    segments: Tensor | None = None,
    softcap: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the last `window` keys and kernel attention over all keys before them, under one normaliser.

        y = (s sum_window exp(a_j - m) v_j + (1 - s) sum_before f(q) f(k_j) v_j) / (the same without v)

    with a_j the scaled scores of the window and m the largest of them. Without a window it is plain kernel attention.

    Args:
        q: `[B, H, T, D]`. k, v: `[B, G, S, D]`; the queries are those of the last T keys, and S - T <= window keys come
            before them.
        features_q: `[B, H, T, F]`, features_k: `[B, G, S, F]`, float32, >= 0.
        window: tokens, the query's own included; 0 is none.
        share: `[H]` in (0, 1), the weight s of the softmax part; needed with a window.
        segments: `[B or 1, S]`; negative is padding, anything else is seen.
        state: `[B, G, F, D + 1]` float32, what was before the keys given: sum of f(k) (v, 1). None is nothing.

    Returns:
        `[B, H, T, D]` in q's dtype, and the state once the window has moved on past the last query.

    Source: arXiv 2410.10254 (LoLCATs) section 3.3; without window arXiv 2006.16236.
    """
    _, heads, queries, size = q.shape
    groups, past = k.shape[1], k.shape[2] - queries
    if not 0 <= past <= window:
        raise ValueError(f"{k.shape[2]} keys for {queries} queries; a window of {window} allows at most as many more")
    if segments is not None:
        features_k = features_k * (segments >= 0)[:, None, :, None]
    # the key that leaves the window as query t comes is that of t - W: padded so, the key at t
    leaving_k, leaving_v = (F.pad(t, (0, 0, window - past, 0))[:, :, :queries] for t in (features_k, v.float()))
    leaving_v = torch.cat([leaving_v, torch.ones_like(leaving_v[..., :1])], -1)
    linear, state = causal_kernel_sum(
        features_q.unflatten(1, (groups, heads // groups)), leaving_k, leaving_v, state=state
    )
    total = linear.flatten(1, 2)
    if window:
        if share is None:
            raise ValueError("share is missing; a window needs the weight of its softmax")
        scale = size**-0.5 if scale is None else scale

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            scores = _scores(q, k, mask, scale, softcap)
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            return torch.cat([weights @ v.float(), weights.sum(-1, keepdim=True)], -1)

        near = _over_blocks(q, k, v, window, segments, attend)
        weight = share.float().view(1, heads, 1, 1)
        total = weight * near + (1 - weight) * total
    values, normaliser = total[..., :-1], total[..., -1:]
    return (values / torch.where(normaliser > 0, normaliser, 1.0)).to(q.dtype), state


def causal_kernel_sum(q: Tensor, k: Tensor, v: Tensor, *, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sum_{j <= t} (q_t . k_j) v_j`, in chunks, and the state `sum_j k_j v_j` after the last.

    Args:
        q: `[B, G, R, T, F]`, k: `[B, G, T, F]`, v: `[B, G, T, D]`, float32.
        state: `[B, G, F, D]` of what came before.

    Returns:
        `[B, G, R, T, D]`, and the new state.
    """
    tokens = q.shape[3]
    if state is None:
        state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    if tokens == 1:
        state = state + k.transpose(-1, -2) @ v
        return (q.flatten(2, 3) @ state).unflatten(2, q.shape[2:4]), state
    chunk = min(_CHUNK, tokens)
    fill = -tokens % chunk
    q, k, v = (F.pad(t, (0, 0, 0, fill)).unflatten(-2, (-1, chunk)) for t in (q, k, v))
    sums = (k.transpose(-1, -2) @ v).cumsum(2)  # [B, G, N, F, D]
    before = torch.cat([torch.zeros_like(sums[:, :, :1]), sums[:, :, :-1]], 2) + state[:, :, None]
    inside = (q @ k.transpose(-1, -2)[:, :, None]).tril() @ v[:, :, None]
    out = inside + q @ before[:, :, None]
    return out.flatten(3, 4)[:, :, :, :tokens], sums[:, :, -1] + state


def gated_sum(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`gated_kernel_sum` by the fastest way that computes the same on this device."""
    kernel = gated_kernel(q.device.type, gated_kernel_sum) if q.is_cuda else None
    return (kernel or gated_kernel_sum)(q, k, v, log_decay, state=state)


def gated_kernel_sum(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`q_t S_t` with `S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t`, in chunks, and the state after the last.

    Args:
        q: `[B, G, R, T, F]`, k: `[B, G, T, F]`, v: `[B, G, T, D]`, float32.
        log_decay: `[B, G, T, F]` in [LOG_DECAY_MIN, 0].
        state: `[B, G, F, D]` of what came before.

    Returns:
        `[B, G, R, T, D]`, and the new state.

    Source: arXiv 2312.06635 section 3.
    """
    tokens = q.shape[3]
    if state is None:
        state = q.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    chunk = min(_GATED_CHUNK, tokens)
    fill = -tokens % chunk
    q, k, v, log_decay = (F.pad(t, (0, 0, 0, fill)).unflatten(-2, (-1, chunk)) for t in (q, k, v, log_decay))
    since = log_decay.cumsum(-2)  # of a chunk's beginning
    whole = since[..., -1:, :]
    q = q * since.exp()[:, :, None]
    inside = (q @ (k * (-since).exp()).transpose(-1, -2)[:, :, None]).tril() @ v[:, :, None]
    added = (k * (whole - since).exp()).transpose(-1, -2) @ v
    kept = whole.exp().transpose(-1, -2)
    outs = []
    for query, gain, keep in zip(q.unbind(3), added.unbind(2), kept.unbind(2), strict=True):
        outs.append(query @ state[:, :, None])
        state = keep * state + gain
    out = inside + torch.stack(outs, 3)
    return out.flatten(3, 4)[:, :, :, :tokens], state
