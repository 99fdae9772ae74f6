"""Losses of healing: each a pure function of what the student and the teacher compute, per token.

K scored tokens, V vocabulary, B sequences, T tokens, E hidden size, G key/value heads, D head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerboost.scoring import CHUNK_ELEMENTS, kl_divergence, log_probabilities

Head = Callable[[Tensor], Tensor]
LossName = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "cross_entropy", "hidden", "cosine", "attention", "values"
]


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
        head: hidden states to logits, the same for both, and frozen.
        chunk: tokens whose logits are held at a time; None keeps them below 128 MiB in float32.

    Returns:
        A float32 scalar.
    """

    def per_token(found: Tensor, span: slice) -> Tensor:
        expected = None
        if teacher is not None:
            with torch.no_grad():
                expected = log_probabilities(teacher[span], head)
        parts = [w * LOSSES[name].function(found, expected, targets[span]) for name, w in weights.items()]
        return torch.stack(parts).sum(0)

    return chunked(student, head, per_token, chunk=chunk)


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
    student: Tensor, head: Head, per_token: Callable[[Tensor, slice], Tensor], *, chunk: int | None = None
) -> Tensor:
    """Sum of `per_token(log-probabilities [k, V], span) -> [k]` over chunks of the tokens `[K, E]`.

    The gradient is computed chunk by chunk on the way forward, so no logits are kept or computed twice.
    """
    if chunk is None:
        vocabulary = getattr(head, "out_features", 0) or head(student[:1]).shape[-1]
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    return _Chunked.apply(student, head, per_token, chunk)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, student: Tensor, head: Head,
        per_token: Callable[[Tensor, slice], Tensor], chunk: int,
    ) -> Tensor:  # fmt: skip
        total = student.new_zeros((), dtype=torch.float32)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None  # type: ignore[attr-defined]
        for start in range(0, len(student), chunk):
            span = slice(start, start + chunk)
            piece = student[span].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                value = per_token(log_probabilities(piece, head), span).sum()
            if gradient is not None:
                (gradient[span],) = torch.autograd.grad(value, piece)
            total += value.detach()
        ctx.gradient = gradient  # type: ignore[attr-defined]
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        gradient = ctx.gradient  # type: ignore[attr-defined]
        return (gradient * upstream[0].to(gradient.dtype)), None, None, None
