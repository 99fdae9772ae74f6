"""What a killed healing goes on from: what is trained, optimiser, random state and curve after a step, to the bit."""

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerboost.artifacts import MANIFEST, check_space, intact, publish_folder, read_json
from layerboost.errors import EnvironmentTrouble, UsageError

_KEPT = 2
_NAME = re.compile(r"step-(\d{6,})")
_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_step(
    folder: Path,
    step: int,
    parameters: dict[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Publish `step-NNNNNN`; drop all but the newest two of this healing, and those of any other.

    Args:
        best: what was trained, as it was at the best look so far.

    Raises:
        EnvironmentTrouble: the disk lacks the space; what was saved before stays as it is.
    """
    moments = {  # of parameters that were trained so far
        f"{key}.{name}": optimizer.state[tensor][key]
        for name, tensor in parameters.items()
        for key in _STATE
        if tensor in optimizer.state
    }
    moments["random"] = torch.get_rng_state()
    check_space(folder, _bytes(parameters) + _bytes(best) + _bytes(moments))
    final = folder / f"step-{step:06}"
    if final.exists() and _inputs_of(final) is None:  # a damaged one, which nothing could be told of
        shutil.rmtree(final)
    with publish_folder(final, inputs) as partial:
        _write(parameters, partial / "trained.safetensors")
        _write(best, partial / "best.safetensors")
        _write(moments, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    for unfinished in folder.glob(".step-*"):  # by a kill; nobody else writes here
        shutil.rmtree(unfinished, ignore_errors=True)
    own = [path for _, path in steps(folder) if _inputs_of(path) == inputs]
    for _, path in steps(folder):
        if path not in own[-_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Published steps, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def clear_steps(folder: Path) -> None:
    """Remove all states, finished or not, and the folder, unless there is anything else in it."""
    for path in [*folder.glob("step-*"), *folder.glob(".step-*")]:
        if _NAME.match(path.name.removeprefix(".")):
            shutil.rmtree(path, ignore_errors=True)
    (folder / ".lock").unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def newest(folder: Path, inputs: dict[str, str]) -> Path | None:
    """The newest step that is intact and was made from the same inputs."""
    for _, path in reversed(steps(folder)):
        if _inputs_of(path) == inputs and intact(path, deep=True):
            return path
    return None


def load_step(
    path: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put a published step in place; returns its state, and the best weights so far."""
    trained, best, moments = (load_file(path / f"{name}.safetensors") for name in ("trained", "best", "optimizer"))
    state = read_json(path / "state.json")
    torch.set_rng_state(moments["random"])
    with torch.no_grad():
        for name, tensor in parameters.items():
            tensor.copy_(trained[name])
            if f"step.{name}" in moments:
                optimizer.state[tensor] = {
                    key: moments[f"{key}.{name}"].to("cpu" if key == "step" else tensor.device) for key in _STATE
                }
    return state, best


def _inputs_of(path: Path) -> dict[str, str] | None:
    """As its manifest says; nothing else is read, which is a lot."""
    try:
        return read_json(path / MANIFEST).get("inputs")
    except UsageError:
        return None


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as trouble:
        raise EnvironmentTrouble(
            f"{path.parent} cannot be written: {trouble}; it needs {_bytes(tensors):,} bytes: free some space and give "
            "the same command again, what was saved before is intact"
        ) from None


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
