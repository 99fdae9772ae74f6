"""What a plan will give on vLLM: cache, requests in work at once, and output tokens per second, before anything runs.

vLLM's scheduler is played through step by step on the plan's cache (`schedule`), and each step is given the time that
its work (`work`) takes on a device (`device`). Nothing here loads weights or needs vLLM.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares

from layerboost.artifacts import Load
from layerboost.cost.device import Device
from layerboost.cost.schedule import Step, schedule
from layerboost.cost.work import Work
from layerboost.errors import DataError
from layerboost.vllm.kv import KVLayout

_MEMORY_SHARE = 0.9  # of a device's memory that vLLM takes
_LEAST = 1e-7  # seconds; what a cost of nothing starts from
_PRIOR = 0.01  # how much a factor of e away from the start weighs, against a relative error of the same size


@dataclass(frozen=True)
class Prediction:
    """One model under one load.

    Attributes:
        kv_bytes_per_token: cache of one sequence at its end, divided by its tokens; padding of groups included.
        running: requests in work at once, mean over steps.
        token_flops: work of one token, attention left out.
    """

    seconds: float
    tokens_per_second: float
    kv_bytes_per_token: float
    kv_padding: float
    running: float
    preemptions: int
    steps: int
    token_flops: float

    @property
    def token_flops_giga(self) -> float:
        return self.token_flops / 1e9


def predict(
    work: Work, layout: KVLayout, kv_memory: int, load: Load, device: Device, max_batched_tokens: int
) -> Prediction:
    """What vLLM will do with a load.

    Args:
        kv_memory: bytes for keys and values, over all devices.

    Raises:
        DataError: a single request does not fit the memory.
    """
    tokens = load.prompt_tokens + load.output_tokens
    blocks = kv_memory // layout.block_bytes
    steps = schedule(layout, blocks, load, max_batched_tokens)
    seconds = float(step_seconds(work, Counts.of(work, steps), device).sum())
    return Prediction(
        seconds=seconds,
        tokens_per_second=load.requests * load.output_tokens / seconds,
        kv_bytes_per_token=layout.sequence_bytes(tokens) / tokens,
        kv_padding=1 - layout.used_share,
        running=float(np.mean([step.running for step in steps])),
        preemptions=sum(step.preempted for step in steps),
        steps=len(steps),
        token_flops=work.token_flops,
    )


def cache_memory(work: Work, device: Device) -> int:
    """Bytes that vLLM has for keys and values beside the weights.

    Raises:
        DataError: the weights leave nothing.
    """
    memory = int(device.memory * _MEMORY_SHARE - work.weight_bytes)
    if memory <= 0:
        raise DataError(
            f"{work.weight_bytes / 1e9:.1f} GB of weights leave no memory for a cache on {device.name} "
            f"({device.memory / 1e9:.0f} GB); use more or larger devices"
        )
    return memory


@dataclass(frozen=True)
class Counts:
    """What the steps of a load do, `[steps]` each: tokens, sequences sampled from and in work, and over all layers the
    pairs of queries and keys of prompts and the keys that decoding looks at."""

    tokens: np.ndarray
    sampled: np.ndarray
    running: np.ndarray
    pairs: np.ndarray
    reads: np.ndarray

    @classmethod
    def of(cls, work: Work, steps: list[Step]) -> "Counts":
        kinds = work.attentions.items()
        return cls(
            tokens=np.array([step.tokens for step in steps], dtype=float),
            sampled=np.array([step.sampled for step in steps], dtype=float),
            running=np.array([step.running for step in steps], dtype=float),
            pairs=np.array([sum(n * step.pairs(window) for window, n in kinds) for step in steps], dtype=float),
            reads=np.array([sum(n * step.reads(window) for window, n in kinds) for step in steps], dtype=float),
        )


def step_parts(work: Work, counts: Counts, device: Device) -> dict[str, np.ndarray]:
    """Where the time of each step goes, `[steps]` each."""
    flops = counts.tokens * work.token_flops + counts.sampled * work.head_flops
    calls = sum(work.attentions.values()) * device.call_seconds
    return {
        "weights": np.maximum(flops / device.flops, work.weight_bytes / device.bandwidth),
        "attention over prompts": counts.pairs * work.pair_flops / device.attention_flops,
        "attention in decoding": counts.reads * work.kv_bytes / device.kv_bandwidth,
        "steps": device.step_seconds + counts.running * (device.sequence_seconds + calls),
    }


def step_seconds(work: Work, counts: Counts, device: Device) -> np.ndarray:
    """Time of each step, `[steps]`."""
    return np.sum(list(step_parts(work, counts, device).values()), axis=0)


@dataclass(frozen=True)
class Measured:
    """A load that was measured: what ran, and the seconds it took."""

    name: str
    work: Work
    counts: Counts
    seconds: float

    def predicted(self, device: Device) -> float:
        return float(step_seconds(self.work, self.counts, device).sum())

    def shares(self, device: Device) -> dict[str, float]:
        """Of the predicted time."""
        parts = {name: float(part.sum()) for name, part in step_parts(self.work, self.counts, device).items()}
        return {name: part / sum(parts.values()) for name, part in parts.items()}


def calibrate(measured: list[Measured], start: Device) -> Device:
    """The device that explains measured loads best, not far from `start` where they do not tell."""
    keys = ("flops", "bandwidth", "attention_flops", "kv_bandwidth", "step_seconds", "sequence_seconds", "call_seconds")
    origin = np.log([max(getattr(start, key), _LEAST) for key in keys])

    def device(logs: np.ndarray) -> Device:
        return start.model_copy(update=dict(zip(keys, np.exp(logs).tolist(), strict=True)))

    def misfit(logs: np.ndarray) -> np.ndarray:
        found = device(logs)
        errors = [np.log(one.predicted(found) / one.seconds) for one in measured]
        return np.concatenate([errors, _PRIOR * (logs - origin)])

    solved = least_squares(misfit, origin)
    return device(solved.x).model_copy(update={"how": f"calibrated on {len(measured)} measured loads"})


__all__ = [
    "Counts", "Device", "Measured", "Prediction", "Work", "cache_memory", "calibrate", "predict", "schedule",
    "step_seconds",
]  # fmt: skip
