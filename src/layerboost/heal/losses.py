"""Losses of healing: forward KL on the logits, and agreement of hidden states.

N sequences, T tokens, K scored tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from layerboost.scoring import CHUNK_ELEMENTS, kl_divergence, log_probabilities

Head = Callable[[Tensor], Tensor]


def chunked_kl(student: Tensor, teacher: Tensor, head: Head, *, chunk: int | None = None) -> Tensor:
    """Mean KL(teacher || student) over tokens, in nats, without ever holding all logits.

    Logits are computed `chunk` tokens at a time and again in the backward pass, so memory is `chunk * V`.

    Args:
        student, teacher: `[K, E]` final hidden states; no gradient reaches the teacher's.
        head: hidden states to logits, the same for both.
        chunk: tokens; None keeps logits below 128 MiB in float32.

    Returns:
        A float32 scalar; 0 where K is 0.
    """
    if not len(student):
        return student.sum() * 0.0
    if chunk is None:
        vocabulary = getattr(head, "out_features", 0) or head(student[:1]).shape[-1]
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
    if len(student) <= chunk:
        return _kl_sum(student, teacher, head) / len(student)
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), chunk):
        span = slice(start, start + chunk)
        total = total + checkpoint(_kl_sum, student[span], teacher[span], head, use_reentrant=False)
    return total / len(student)


def _kl_sum(student: Tensor, teacher: Tensor, head: Head) -> Tensor:
    with torch.no_grad():
        expected = log_probabilities(teacher, head)
    return kl_divergence(expected, log_probabilities(student, head)).sum()


def hidden_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over layers of the squared distance of hidden states `[N, T, E]`, as a share of the teacher's variance."""
    parts = [(s.float() - t.float()).square().mean() / t.float().var() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).mean()
