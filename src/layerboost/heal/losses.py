"""Losses of healing: each a pure function of what the student and the teacher compute, per token.

K scored tokens, V vocabulary, B sequences, T tokens, E hidden size, G key/value heads, D head size.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerboost.scoring import CHUNK_ELEMENTS, kl_divergence

Head = Callable[[Tensor], Tensor]
PerToken = Callable[[Tensor, Tensor | None, slice], Tensor]
# logits of the student and of the teacher, where the gradient goes, which tokens, to the loss; the gradient may be
# written over the teacher's logits
Block = Callable[[Tensor, Tensor | None, Tensor | None, slice], Tensor]
LossName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy", "hidden", "cosine", "attention", "values"
]

# elements of logits whose losses are computed at once on a CPU: tensors below 32 MiB take memory that is there, and
# larger ones are given new memory page by page, which costs more than what is computed in it; on a GPU, a whole chunk,
# as what costs there are the calls
_BLOCK = 2**22
_WORTH_COMPILING = 2**24  # elements of logits: below, the compiler's seconds are more than what its kernel saves


def forward_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL(teacher || student) in nats; `[K, V]` log-probabilities each, and `[K]` token ids, to `[K]`."""
    return kl_divergence(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """KL(student || teacher) in nats; shapes as `forward_kl`. Source: arXiv 2306.08543 (MiniLLM)."""
    return kl_divergence(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Mean KL of both to their average, in nats, at most log 2; shapes as `forward_kl`. Source: arXiv 2306.13649."""
    middle = torch.logaddexp(student, teacher) - math.log(2)
    return (kl_divergence(student, middle) + kl_divergence(teacher, middle)) / 2


def cross_entropy(student: Tensor, teacher: Tensor | None, targets: Tensor) -> Tensor:
    """NLL of the data in nats; no teacher is needed; shapes as `forward_kl`."""
    return F.nll_loss(student, targets, reduction="none")


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance as a share of the teacher's squared length, `[..., E]` each to `[...]` float32.

    Every token counts alike: pretrained models have a few whose states are a thousand times longer.
    """
    error = (student.float() - teacher.float()).square().sum(-1)
    return error / teacher.float().square().sum(-1).clamp(min=1e-12)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine, `[..., E]` each to `[...]` float32. Source: arXiv 1910.01108 (DistilBERT)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def value_relations(student: Tensor, teacher: Tensor, visible: Tensor) -> Tensor:
    """KL of the softmax over scaled products of values, mean over heads: `[B, G, T, D]` each to `[B, T]`.

    Args:
        visible: `[B or 1, T, T]` bool, which keys a query may be related to; at least one for each.

    Source: arXiv 2002.10957 (MiniLM) section 3.2.
    """

    def relations(values: Tensor) -> Tensor:
        values = values.float()
        scores = values @ values.transpose(-1, -2) / values.shape[-1] ** 0.5
        return scores.masked_fill(~visible[:, None], torch.finfo(torch.float32).min).log_softmax(-1)

    return kl_divergence(relations(teacher), relations(student)).mean(1)


@dataclass(frozen=True)
class Loss:
    """
    Attributes:
        needs: what it compares: `logits` of scored tokens; `layers`, the outputs of changed layers; `attentions`, those
            of the attentions in changed layers that have a mixer; `values`, those of the last full attention.
        teacher: whether it asks the teacher at all.
    """

    function: Callable[..., Tensor]
    needs: Literal["logits", "layers", "attentions", "values"]
    teacher: bool = True


LOSSES: dict[str, Loss] = {
    "forward_kl": Loss(forward_kl, "logits"),
    "reverse_kl": Loss(reverse_kl, "logits"),
    "jensen_shannon": Loss(jensen_shannon, "logits"),
    "cross_entropy": Loss(cross_entropy, "logits", teacher=False),
    "hidden": Loss(relative_error, "layers"),
    "cosine": Loss(cosine, "layers"),
    "attention": Loss(relative_error, "attentions"),
    "values": Loss(value_relations, "values"),
}


def mixed_logits_loss(
    weights: dict[str, float], student: Tensor, teacher: Tensor | None, targets: Tensor, head: Head,
    *, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Weighted sum over tokens of losses on logits, without ever holding all logits.

    Args:
        weights: of losses that need `logits`.
        student, teacher: `[K, E]` final hidden states; no gradient reaches the teacher's. None where no loss asks.
        targets: `[K]` token ids.
        head, chunk: as for `chunked`.

    Returns:
        A float32 scalar.
    """
    if list(weights) == ["forward_kl"] and teacher is not None:
        return weights["forward_kl"] * _chunked(student, teacher, head, _kl_block, chunk)

    def per_token(found: Tensor, expected: Tensor | None, span: slice) -> Tensor:
        parts = [w * LOSSES[name].function(found, expected, targets[span]) for name, w in weights.items()]
        return torch.stack(parts).sum(0)

    return chunked(student, teacher, head, per_token, chunk=chunk)


def top_k_kl(student: Tensor, ids: Tensor, expected: Tensor) -> Tensor:
    """KL in nats of what is kept of a teacher: its likeliest tokens, and all others as one.

    Never more than the whole KL, and equal to it where the student spreads the rest as the teacher does.

    Args:
        student: `[K, V]` log-probabilities.
        ids: `[K, k]` token ids.
        expected: `[K, k]` their log-probabilities.

    Returns:
        `[K]`.
    """
    kept = student.gather(-1, ids)
    tail, own_tail = (1 - p.exp().sum(-1).clamp(max=1 - 1e-6) for p in (expected, kept))
    return kl_divergence(expected, kept) + tail * (tail.log() - own_tail.log())


def chunked(
    student: Tensor, teacher: Tensor | None, head: Head, per_token: PerToken, *, chunk: int | None = None
) -> Tensor:
    """Sum over tokens of a loss on logits, a float32 scalar.

    The gradient is computed chunk by chunk on the way forward, so no logits are kept or computed twice; it is written
    over the teacher's logits. On a CPU that is done a block of tokens at a time: beside logits are small tensors alone.

    Args:
        student, teacher: `[K, E]` final hidden states; no gradient reaches the teacher's.
        head: hidden states to logits, in memory of their own; the same for both, and frozen.
        per_token: log-probabilities `[k, V]` of the student, those of the teacher or None, and which tokens, to `[k]`.
        chunk: tokens whose logits are held at a time; None keeps them below 256 MiB in float32.
    """

    def block(logits: Tensor, known: Tensor | None, upstream: Tensor | None, tokens: slice) -> Tensor:
        expected = None if known is None else known.float().log_softmax(-1)
        found = logits.detach().requires_grad_(upstream is not None)
        with torch.set_grad_enabled(upstream is not None):
            value = per_token(found.float().log_softmax(-1), expected, tokens).sum()
        if upstream is not None:
            upstream.copy_(torch.autograd.grad(value, found)[0])
        return value.detach()

    return _chunked(student, teacher, head, block, chunk)


def kl_over_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """`forward_kl` of logits, `[k, V]` each, to `[k]` float32; its gradient is written over the teacher's logits.

    It is the student's softmax less the teacher's: written down, it takes a sixth less time than by autograd on a CPU,
    and half as much on a GPU that compiles it (`benchmarks/losses.py`).
    """
    found, ratio = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    expected = ratio.exp()
    ratio.sub_(found)
    teacher.copy_(found.exp_().sub_(expected))
    return expected.mul_(ratio).sum(-1)


def _kl_block(logits: Tensor, known: Tensor | None, upstream: Tensor | None, tokens: slice) -> Tensor:
    assert known is not None
    fused = fused_kl(logits.dtype) if logits.is_cuda and logits.numel() >= _WORTH_COMPILING else None
    return (fused or kl_over_teacher)(logits.detach(), known).sum()


@cache
@torch.no_grad()
def fused_kl(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor] | None:
    """`kl_over_teacher` as one kernel, with no memory beside the logits, for a GPU and logits of this dtype.

    None if its compiler is not there, or makes one that does not compute the same.
    """
    kernel = torch.compile(kl_over_teacher, dynamic=True)
    generator = torch.Generator("cuda").manual_seed(0)
    student, teacher = (5 * torch.randn(65, 3_001, device="cuda", generator=generator).to(dtype) for _ in range(2))
    wanted, found = teacher.clone(), teacher.clone()
    try:
        torch.testing.assert_close(kernel(student, found), kl_over_teacher(student, wanted), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, wanted)
    except Exception as trouble:
        warnings.warn(f"the loss is not compiled: {str(trouble)[:200]}", stacklevel=2)
        return None
    return kernel


def _chunked(student: Tensor, teacher: Tensor | None, head: Head, block: Block, chunk: int | None) -> Tensor:
    if chunk is None:
        vocabulary = getattr(head, "out_features", 0) or head(student[:1]).shape[-1]
        chunk = max(1, 2 * CHUNK_ELEMENTS // vocabulary)
    return _Chunked.apply(student, teacher, head, block, chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, student: Tensor, teacher: Tensor | None, head: Head,
        block: Block, chunk: int,
    ) -> Tensor:  # fmt: skip
        trains = ctx.needs_input_grad[0]  # type: ignore[attr-defined]
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.zeros_like(student) if trains else None
        for span in _spans(0, len(student), chunk):
            piece = student[span].detach().requires_grad_(trains)
            with torch.set_grad_enabled(trains):
                logits = head(piece)
            known = None if teacher is None else head(teacher[span])
            upstream = torch.empty_like(logits) if known is None else known
            size = chunk if logits.is_cuda else max(1, _BLOCK // logits.shape[-1])
            for tokens in _spans(span.start, span.stop, size):
                rows = slice(tokens.start - span.start, tokens.stop - span.start)
                of_teacher = None if known is None else known[rows]
                total += block(logits[rows], of_teacher, upstream[rows] if trains else None, tokens)
            if gradient is not None:
                (gradient[span],) = torch.autograd.grad(logits, piece, upstream)
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient = ctx.gradient  # type: ignore[attr-defined]
        return (gradient * upstream[0].to(gradient.dtype)), None, None, None, None


def _spans(start: int, stop: int, size: int) -> list[slice]:
    """As few as can be of at most this size, all about as long: matrix products with few rows are slow."""
    count = stop - start
    parts = -(-count // size)
    return [slice(start + i * count // parts, start + (i + 1) * count // parts) for i in range(parts)]
