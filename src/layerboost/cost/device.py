"""How fast a device is: known ones by their data sheets, this one by a short probe, any by measured benches."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from layerboost.artifacts import Record, read_json, validate
from layerboost.errors import UsageError

# published peak rates: dense bfloat16 TFLOP/s, memory GB/s, memory GB
_SHEETS = {
    "a10": (125, 600, 24), "l4": (121, 300, 24), "rtx-4090": (165, 1_008, 24), "a100-80gb": (312, 2_039, 80),
    "h100": (989, 3_350, 80), "h200": (989, 4_800, 141),
}  # fmt: skip
# what engines usually reach of a data sheet, and a step's and a sequence's time on the host: rules of thumb
_COMPUTE, _ATTENTION, _BANDWIDTH, _STEP, _SEQUENCE = 0.6, 0.4, 0.8, 2e-3, 1e-5
_RATES = ("flops", "bandwidth", "attention_flops", "kv_bandwidth", "memory")


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Device(Record):
    """A device, or several that share a model.

    Attributes:
        how: where the numbers come from.
        flops, attention_flops: reached per second, by weights and by attention over prompts.
        bandwidth, kv_bandwidth: bytes per second, of weights and of the cache in decoding.
        memory: bytes.
        step_seconds, sequence_seconds, call_seconds: what a step costs beside its work: once, per sequence, and per
            sequence and layer with attention.
    """

    name: str
    how: str
    flops: Rate
    bandwidth: Rate
    attention_flops: Rate
    kv_bandwidth: Rate
    memory: Rate
    step_seconds: float = Field(_STEP, ge=0)
    sequence_seconds: float = Field(_SEQUENCE, ge=0)
    call_seconds: float = Field(0.0, ge=0)

    def times(self, count: int) -> "Device":
        """`count` of them, splitting every layer; talking to one another is not counted."""
        if count == 1:
            return self
        scaled = {key: getattr(self, key) * count for key in _RATES}
        return self.model_copy(update={**scaled, "name": f"{count} x {self.name}"})


def known_device(name: str) -> Device:
    """Raises UsageError if it is not in the list."""
    if name not in _SHEETS:
        raise UsageError(f"device must be one of {', '.join(_SHEETS)}, here, or a file, found {name!r}")
    tflops, gigabytes_per_second, gigabytes = _SHEETS[name]
    return Device(
        name=name, how="data sheet and rules of thumb", flops=_COMPUTE * tflops * 1e12,
        attention_flops=_ATTENTION * tflops * 1e12, bandwidth=_BANDWIDTH * gigabytes_per_second * 1e9,
        kv_bandwidth=_BANDWIDTH * gigabytes_per_second * 1e9, memory=gigabytes * 1e9,
    )  # fmt: skip


def find_device(name: str) -> Device:
    """A known device, `here` for this machine by a short probe, or a file that `calibrate` or a person wrote.

    Raises:
        UsageError: none of them, or a file with other keys.
    """
    if name == "here":
        return probe("cuda" if torch.cuda.is_available() else "cpu")
    if Path(name).is_file():
        return validate(Device, read_json(Path(name)), name, UsageError)
    return known_device(name)


def probe(device: str) -> Device:
    """This machine's speed in matrix products and in copying, within a few seconds."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.rand(shape, device=device).to(dtype) for shape in ((2_048, 1_024), (1_024, 4_096)))
    flops = 2 * 2_048 * 1_024 * 4_096 * _rate(lambda: a @ b, device)
    source = torch.rand(2**26, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes * _rate(lambda: target.copy_(source), device)
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), float(torch.cuda.get_device_properties(0).total_memory)
    else:
        name = f"cpu, {torch.get_num_threads()} threads"
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        name=name, how="probed", flops=flops, attention_flops=flops * _ATTENTION / _COMPUTE, bandwidth=bandwidth,
        kv_bandwidth=bandwidth, memory=memory,
    )  # fmt: skip


def _rate(work: Callable[[], object], device: str, seconds: float = 0.5) -> float:
    """Runs per second."""

    def five() -> None:
        for _ in range(5):
            work()
        if device == "cuda":
            torch.cuda.synchronize()

    five()  # warms up
    runs, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        five()
        runs += 5
    return runs / passed
