"""How far a student is from its teacher, per token and per sequence, with honest intervals.

N sequences, T tokens each, K scored tokens, E hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from layerboost.artifacts import Estimate
from layerboost.data.sequences import Sequences

CHUNK_ELEMENTS = 2**25  # logits worked on at once: 128 MiB in float32
_RESAMPLES = 1_000


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, `[K]`: NLL in nats, whether it is the likeliest, and KL(teacher || student) in nats."""

    nll: Tensor
    hit: Tensor
    kl: Tensor

    def per_sequence(self, scored: Tensor) -> dict[str, np.ndarray]:
        """Means over each sequence's scored tokens, `[N]`, for `scored` of shape `[N, T]`.

        `lead` is the share of them before the first that is not the likeliest: how far a greedy completion follows.
        """
        scored = scored.cpu()
        rows = scored[:, 1:].nonzero()[:, 0]
        count = torch.bincount(rows, minlength=scored.shape[0])
        missed = torch.cumsum(1 - self.hit.cpu().long(), 0)
        before = torch.cat([torch.zeros(1, dtype=torch.long), missed])[torch.cumsum(count, 0) - count]
        lead = missed == before[rows]
        return {
            name: (
                torch.zeros(scored.shape[0], dtype=torch.float64).index_add_(0, rows, values.cpu().double())
                / count.clamp(min=1)
            ).numpy()
            for name, values in (("nll", self.nll), ("hit", self.hit), ("kl", self.kl), ("lead", lead))
        }


def batch_rows(length: int, vocabulary: int, hidden: int, layers: int, device: torch.device | None = None) -> int:
    """Sequences per batch, so that logits and captured hidden states stay near half a gigabyte each; on a GPU more, by
    the memory that it has, whatever is free: the same machine gives the same batches, and so the same numbers."""
    scale = 1
    if device is not None and device.type == "cuda":
        scale = max(1, torch.cuda.get_device_properties(device).total_memory // 2**34)
    logits, states = 2**27 // (length * vocabulary), 2**27 // (length * hidden * layers)
    return max(1, scale * min(logits, states, 8_192 // length))


def scored_hidden(hidden: Tensor, scored: Tensor) -> Tensor:
    """`[N, T, E]` final hidden states to `[K, E]`: those that predict a scored token."""
    return hidden[:, :-1][scored[:, 1:]]


def scored_targets(batch: Sequences) -> Tensor:
    """`[K]` token ids that count."""
    return batch.tokens[:, 1:][batch.scored[:, 1:]]


def log_probabilities(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """`[K, E]` to `[K, V]` float32."""
    return head(hidden).float().log_softmax(-1)


@torch.no_grad()
def token_scores(hidden: Tensor, head: Callable[[Tensor], Tensor], teacher: Tensor, targets: Tensor) -> TokenScores:
    """Compare a student with its teacher.

    Args:
        hidden: `[K, E]`, the student's.
        head: the student's, to logits.
        teacher: `[K, V]` log-probabilities.
        targets: `[K]` token ids.
    """
    rows = max(1, CHUNK_ELEMENTS // teacher.shape[-1])
    parts = []
    for start in range(0, len(targets), rows):
        span = slice(start, start + rows)
        student, expected, target = log_probabilities(hidden[span], head), teacher[span], targets[span]
        parts.append(
            (
                F.nll_loss(student, target, reduction="none"),
                (student.argmax(-1) == target).float(),
                kl_divergence(expected, student),
            )
        )
    nll, hit, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    return TokenScores(nll, hit, kl)


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) in nats, `[K, V]` log-probabilities each to `[K]`."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def estimate(values: np.ndarray) -> Estimate:
    """Mean over sequences with a 95 % percentile bootstrap interval; the same for the same values."""
    values = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975))
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high), count=len(values))


@torch.no_grad()
def final_hidden(model: Any, tokens: Tensor) -> Tensor:
    """`[N, T]` to `[N, T, E]`, normed and ready for the head."""
    return model.base_model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state


@torch.no_grad()
def generate(model: Any, prompts: Tensor, new_tokens: int, *, eos_token_id: Any = None, **how: Any) -> Tensor:
    """`[B, P]` prompts without padding to `[B, P + new_tokens]`, by these settings alone: the checkpoint's own, which
    may penalise repetition or search with beams, would fill what is left open.

    Args:
        eos_token_id: what ends a text early; None is nothing, and what follows an end is written as well.
        how: `do_sample`, and of sampling what else transformers' `GenerationConfig` has.
    """
    asked = GenerationConfig(max_new_tokens=new_tokens, pad_token_id=0, eos_token_id=eos_token_id, **how)
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        there = torch.ones_like(prompts).to(model.device)
        found: Tensor = model.generate(
            input_ids=prompts.to(model.device), attention_mask=there, generation_config=asked
        )
    finally:
        model.generation_config = own
    return found
