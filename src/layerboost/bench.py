"""bench: how fast, and how much cache, against the original, on plain transformers, side by side."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import DynamicCache

from layerboost.artifacts import Bench, Ratio, Record, save, text_digest
from layerboost.errors import DataError
from layerboost.model.cache import cache_bytes
from layerboost.model.loading import check_pair, digest, find_model, load_model, pick_device, plan_of, read_config
from layerboost.progress import progress
from layerboost.provenance import provenance

Seconds = dict[str, dict[str, list[float]]]


class Config(Record):
    """What `bench` is told.

    Attributes:
        context: tokens of a whole sequence; None is the model's context, at most 1,024.
        new_tokens: how many of them are decoded, the rest is the prompt.
        batch: sequences at once.
        repeats: measurements of each model, one after the other in turn, after one that does not count.
    """

    context: int | None = Field(None, ge=8)
    new_tokens: int = Field(64, ge=1)
    batch: int = Field(8, ge=1)
    repeats: int = Field(5, ge=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"


def inputs(hybrid: Path, against: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out, but for the machine."""
    return {
        "hybrid": digest(hybrid),
        "model": digest(against),
        "settings": text_digest(config.model_dump(mode="json", exclude={"device"})),
    }


def run(hybrid: str | Path, against: str | Path, config: Config | None = None, *, out: Path | None = None) -> Bench:
    """Measure prefill, decode and cache of a hybrid against its original, in one process, interleaved.

    Raises:
        CheckpointError: a model cannot be read.
        DataError: the context does not fit the model.
    """
    config = config or Config()
    hybrid_folder, folder = find_model(hybrid), find_model(against)
    hybrid_config, base_config = read_config(hybrid_folder), read_config(folder)
    plan_of(hybrid_config, hybrid_folder)
    check_pair(hybrid_folder, hybrid_config, folder, base_config)
    context = _context(config, base_config.max_position_embeddings)
    device = pick_device(config.device)
    dtype = torch.float32 if device == "cpu" else None
    models = {
        "base": load_model(folder, dtype=dtype, device=device),
        "healed": load_model(hybrid_folder, dtype=dtype, device=device),
    }
    seconds = measure(models, context - config.new_tokens, config)
    bench = Bench(
        settings={
            "batch": config.batch, "prompt_tokens": context - config.new_tokens, "new_tokens": config.new_tokens,
            "repeats": config.repeats, "device": device, "dtype": str(models["base"].dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "engine": "transformers",
        },
        seconds=seconds,
        speed={phase: ratio(seconds["base"][phase], seconds["healed"][phase]) for phase in ("prefill", "decode")},
        context=context,
        kv_bytes_per_token={name: kv_bytes(model, context) / context for name, model in models.items()},
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        inputs=inputs(hybrid_folder, folder, config),
        provenance=provenance(config),
    )  # fmt: skip
    if out is not None:
        save(bench, out)
    return bench


def _context(config: Config, longest: int) -> int:
    context = config.context or min(longest, 1_024)
    if context > longest or config.new_tokens >= context:
        raise DataError(
            f"context {context} with {config.new_tokens} new tokens does not fit a model of {longest} tokens; choose "
            "context <= the model's and new_tokens < context"
        )
    return context


def ratio(base: list[float], hybrid: list[float]) -> Ratio:
    """Base time over hybrid time, repeat by repeat."""
    ratios = [b / h for b, h in zip(base, hybrid, strict=True)]
    return Ratio(min=min(ratios), median=median(ratios), max=max(ratios))


@torch.no_grad()
def measure(models: dict[str, Any], prompt: int, config: Config) -> Seconds:
    """Seconds of prefill and of decoding, per model and repeat; the first round warms up and is dropped."""
    seconds: Seconds = {name: {"prefill": [], "decode": []} for name in models}
    generator = torch.Generator().manual_seed(0)
    with progress("bench", (config.repeats + 1) * len(models)) as advance:
        for repeat in range(config.repeats + 1):
            vocabulary = models["base"].config.vocab_size
            tokens = torch.randint(0, vocabulary, (config.batch, prompt), generator=generator)
            for name in sorted(models, reverse=bool(repeat % 2)):
                prefill, decode = _once(models[name], tokens, config.new_tokens)
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
        if device.type == "cuda":
            torch.cuda.synchronize(device)
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
