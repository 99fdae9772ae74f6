"""verify: does a checkpoint compute what the hybrid here computes, and keep no more than its plan says?"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerboost.artifacts import ModelRecord, Record, read_json
from layerboost.errors import CheckpointError
from layerboost.layer_plan import LayerPlan
from layerboost.model.loading import (
    describe,
    find_model,
    is_hybrid,
    load_model,
    load_original,
    load_tokenizer,
    plan_of,
    read_config,
    same_tokens,
    tokenizer_files,
)
from layerboost.progress import say
from layerboost.verify import probe, served

DTYPES = Literal["float32", "bfloat16", "float16"]
# of the largest logit: what differs by less is rounding, of other kernels or of other versions
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
SERVED_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # nats; engines round in other places
_LONG, _BEYOND = 1_024, 64  # tokens of a long prompt; at least so many beyond the widest window


class Check(Record):
    """One line of the table: what must hold, what was found, and whether it does."""

    name: str
    found: str
    holds: bool


def run(
    path: str | Path, against: str | Path, *, dtype: DTYPES = "float32", trust_remote_code: bool = False
) -> list[Check]:
    """Compare a checkpoint with the hybrid it was exported from, or with its original under its own plan.

    Args:
        path: a hybrid, a portable export or a native export; or the address of a server of vLLM.
        against: the hybrid; or the original, for a hybrid that is not healed.
        trust_remote_code: run the code that comes with the checkpoint, in a process that has no layerboost.

    Raises:
        CheckpointError: one of the two cannot be read, or they do not belong together.
    """
    if str(path).startswith(("http://", "https://")):
        return _served(str(path), find_model(against), dtype)
    folder, other = find_model(path), find_model(against)
    reference, layers, record = _reference(folder, other, dtype)
    prompts = _prompts(record, layers, reference.config.vocab_size)
    say(f"{len(prompts)} prompts of {', '.join(str(tokens.shape[1]) for tokens in prompts.values())} tokens, {dtype}")
    wanted = probe.measure(reference, prompts)
    del reference
    found = _measure(folder, prompts, dtype, trust_remote_code)
    return [
        _same_tokenizer(folder, other),
        _same_tokens(folder, other),
        *_logits(prompts, wanted, found, dtype),
        _memory(prompts, found, record, layers, dtype, stock=not is_hybrid(read_config(folder))),
    ]


def _served(url: str, other: Path, dtype: DTYPES) -> list[Check]:
    config = read_config(other)
    layers, record = plan_of(config, other), describe(other, other, config)
    prompts = _prompts(record, layers, config.vocab_size, room=served.NEW_TOKENS)
    say(f"{len(prompts)} prompts of {', '.join(prompts)} tokens, {served.NEW_TOKENS} answered, {dtype}")
    answers = served.ask(url, prompts)
    strange = max((token for answer in answers.values() for token in answer.all_tokens), default=0)
    if strange >= config.vocab_size:
        found = f"{strange}, where the hybrid here has {config.vocab_size}: the server has another model"
        return [Check(name="tokens of one vocabulary", found=found, holds=False)]
    model = load_model(other, dtype=getattr(torch, dtype))
    from_best, from_ours = served.differences(model, prompts, answers)
    return [
        _within("greedy tokens against the best here", from_best, SERVED_TOLERANCE[dtype]),
        _within("logprobs against those here", from_ours, SERVED_TOLERANCE[dtype]),
    ]


def _within(name: str, worst: float, limit: float) -> Check:
    found = f"at most {worst:.1e} nats" + ("" if worst <= limit else f", above {limit:g}")
    return Check(name=name, found=found, holds=worst <= limit)


def _reference(folder: Path, other: Path, dtype: DTYPES) -> tuple[Any, list[LayerPlan], ModelRecord]:
    """The hybrid to compare with, its plan, and facts about its model."""
    ours, theirs = read_config(folder), read_config(other)
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        if getattr(ours, key) != getattr(theirs, key):
            raise CheckpointError(
                f"{folder} has {key} {getattr(ours, key)}, {other} has {getattr(theirs, key)}; name the model it was "
                "made from"
            )
    record = describe(other, other, theirs)
    if is_hybrid(theirs):
        layers = plan_of(theirs, other)
        if is_hybrid(ours) and not all(a.alike(b) for a, b in zip(plan_of(ours, folder), layers, strict=True)):
            raise CheckpointError(f"{folder} has another plan than {other}; name the hybrid it was exported from")
        return load_model(other, dtype=getattr(torch, dtype)), layers, record
    if not is_hybrid(ours):
        raise CheckpointError(f"neither {folder} nor {other} is a hybrid; name the hybrid after --against")
    if ours.layerboost.get("provenance", {}).get("healing"):
        raise CheckpointError(f"{folder} is healed, {other} is not; name the hybrid it was exported from")
    layers = plan_of(ours, folder)
    model = load_original(other, dtype=getattr(torch, dtype))
    model.convert(layers)
    return model, layers, record


def _prompts(record: ModelRecord, layers: list[LayerPlan], vocabulary: int, room: int = 8) -> dict[str, Tensor]:
    """Around the widest window that the context holds, and beyond it; with `room` for what comes after a prompt."""
    context = max(1, record.context - room)
    edge = max((plan.window for plan in layers if plan.window and plan.window < context), default=16)
    longest = min(context, max(_LONG, edge + _BEYOND))
    lengths = {1, edge - 1, edge, edge + 1, 2 * edge + 3, 3 * edge + 64}
    generator = torch.Generator().manual_seed(0)
    return {
        str(length): torch.randint(0, vocabulary, (1, length), generator=generator)
        for length in sorted({min(max(length, 1), longest) for length in lengths})
    }


def _measure(folder: Path, prompts: dict[str, Tensor], dtype: DTYPES, trust: bool) -> dict[str, Tensor]:
    config = read_config(folder)
    if is_hybrid(config) and not trust:
        return probe.measure(load_model(folder, dtype=getattr(torch, dtype)), prompts)
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch) / "prompts.safetensors", Path(scratch) / "out.safetensors"
        save_file(prompts, given)
        flags = ["--trust-remote-code"] if trust else []
        command = [sys.executable, probe.__file__, str(folder.resolve()), str(given), str(out), dtype, *flags]
        environment = os.environ | {"HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise CheckpointError(f"{folder} does not open in plain transformers: {last[:300]}")
        return load_file(out)


def _same_tokenizer(folder: Path, other: Path) -> Check:
    names = {path.as_posix() for where in (folder, other) for path in tokenizer_files(where)}
    odd = [n for n in sorted(names) if _contents(folder / n) != _contents(other / n)]
    return Check(
        name="files of the tokenizer",
        found=f"{', '.join(odd)} differ" if odd else f"{len(names)} files alike",
        holds=bool(names) and not odd,
    )


def _same_tokens(folder: Path, other: Path) -> Check:
    """By the classes that transformers opens them with, which depend on the type of the model too."""
    name = "tokens of a sample"
    try:
        one, two = load_tokenizer(folder), load_tokenizer(other)
    except CheckpointError:
        return Check(name=name, found="not read: that takes code of its own", holds=True)
    same = same_tokens(one, two)
    found = "alike" if same else f"{type(one).__name__} and {type(two).__name__} differ"
    return Check(name=name, found=found, holds=same)


def _contents(path: Path) -> Any:
    """Bytes; but of a tokenizer's settings all but the class, which is opened and compared, and may be written down."""
    if path.name != "tokenizer_config.json":
        return path.read_bytes() if path.exists() else None
    return read_json(path, CheckpointError) | {"tokenizer_class": None} if path.exists() else {"tokenizer_class": None}


def _logits(
    prompts: dict[str, Tensor], wanted: dict[str, Tensor], found: dict[str, Tensor], dtype: DTYPES
) -> list[Check]:
    titles = {
        "whole": "logits against the hybrid here",
        "cached": "cached decode against the full forward",
        "chunked": "chunked prefill against the full forward",
        "padded": "left padding against none",
    }
    checks = []
    for way, title in titles.items():
        worst = 0.0
        for name in prompts:
            target = wanted[f"{name}.whole"] if way == "whole" else found[f"{name}.whole"]
            off = (found[f"{name}.{way}"] - target).abs().max() / target.abs().max().clamp(min=1e-9)
            worst = max(worst, float("inf") if torch.isnan(off) else off.item())
        exact = "bit-equal" if worst == 0 else f"at most {worst:.1e} of the largest logit"
        holds = worst <= TOLERANCE[dtype]
        checks.append(Check(name=title, found=exact + ("" if holds else f", above {TOLERANCE[dtype]:g}"), holds=holds))
    return checks


def _memory(
    prompts: dict[str, Tensor],
    found: dict[str, Tensor],
    record: ModelRecord,
    layers: list[LayerPlan],
    dtype: DTYPES,
    stock: bool,
) -> Check:
    """Bytes held after each prompt against what the plan promises in this precision."""
    shape = record.kv_shape.model_copy(update={"bytes_per_value": getattr(torch, dtype).itemsize})
    model = record.model_copy(update={"kv_shape": shape})
    # transformers' own windowed cache holds one token more than a window needs
    windowed = sum(w is not None for w in record.native_windows) + sum(p.mixer == "sliding_attention" for p in layers)
    slack = windowed * shape.bytes_per_token if stock else 0
    promised = {name: model.kv_bytes(layers, int(name)) + slack for name in prompts}
    held = {name: int(found[f"{name}.kv"]) for name in prompts}
    over = [name for name in prompts if held[name] > promised[name]]
    name = over[0] if over else max(prompts, key=int)
    more = " with a token more per window, as stock classes hold" if slack else ""
    return Check(
        name="KV memory as the plan promises",
        found=f"{held[name]:,} bytes after {name} tokens, promised {promised[name]:,}{more}",
        holds=not over,
    )
