"""Prefill and decode on plain transformers: both models in one process, in turn."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from layerboost.model.cache import cache_bytes
from layerboost.progress import progress

Seconds = dict[str, dict[str, list[float]]]


@torch.no_grad()
def measure(models: dict[str, Any], prompt: int, new_tokens: int, batch: int, repeats: int) -> Seconds:
    """Seconds of prefill and of decoding, per model and repeat; the first round warms up and is dropped."""
    seconds: Seconds = {name: {"prefill": [], "decode": []} for name in models}
    generator = torch.Generator().manual_seed(0)
    with progress("bench", (repeats + 1) * len(models)) as advance:
        for repeat in range(repeats + 1):
            vocabulary = models["base"].config.vocab_size
            tokens = torch.randint(0, vocabulary, (batch, prompt), generator=generator)
            for name in sorted(models, reverse=bool(repeat % 2)):
                prefill, decode = _once(models[name], tokens, new_tokens)
                if repeat:
                    seconds[name]["prefill"].append(prefill)
                    seconds[name]["decode"].append(decode)
                advance()
    return seconds


def _once(model: Any, tokens: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    clock = _clock(model.device)
    cache = DynamicCache(config=model.config)
    started = clock()
    logits = model(tokens.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    filled = clock()
    for _ in range(new_tokens):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True).logits
    return filled - started, clock() - filled


def _clock(device: torch.device) -> Callable[[], float]:
    """Wall time once everything that was asked of the device is done."""

    def now() -> float:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        return time.perf_counter()

    return now


@torch.no_grad()
def kv_bytes(model: Any, context: int) -> int:
    """Cache bytes after one sequence of `context` tokens.

    The last token is decoded: until then transformers' own windowed layers keep the whole prompt in memory, and a model
    with native windows would look worse than it is.
    """
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(1, context, dtype=torch.long, device=model.device)
    for part in tokens.split([context - 1, 1], 1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache_bytes(cache)


@torch.no_grad()
def peak_bytes(model: Any, context: int, batch: int) -> int | None:
    """Weights and what else is held at most while `batch` sequences of `context` tokens are read and a token decoded.

    None on CPU. Other models on the device do not count.
    """
    if model.device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    _once(model, torch.zeros(batch, context - 1, dtype=torch.long), 1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return weights + torch.cuda.max_memory_allocated(model.device) - before
