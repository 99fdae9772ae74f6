"""What a killed healing goes on from: adapter, optimiser and curve after some step, exact to the bit."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from layerboost.artifacts import intact, publish_folder, read_json, recorded_inputs
from layerboost.errors import EnvironmentTrouble, UsageError

_KEPT = 2
_NAME = re.compile(r"step-(\d{6,})")
_STATE = ("step", "exp_avg", "exp_avg_sq")


def save_step(
    folder: Path,
    step: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    inputs: dict[str, str],
) -> None:
    """Publish `step-NNNNNN`; drop all but the newest two of this healing, and those of any other."""
    with publish_folder(folder / f"step-{step:06}", inputs) as partial:
        moments = {  # of parameters that were trained so far
            f"{key}.{name}": optimizer.state[tensor][key]
            for name, tensor in parameters.items()
            for key in _STATE
            if tensor in optimizer.state
        }
        try:
            save_file(
                {name: t.detach().contiguous() for name, t in parameters.items()}, partial / "adapter.safetensors"
            )
            save_file(moments, partial / "optimizer.safetensors")
        except SafetensorError as trouble:
            raise EnvironmentTrouble(f"{folder} cannot be written: {trouble}; free some space and run again") from None
        (partial / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
    own = [path for _, path in steps(folder) if recorded_inputs(path) == inputs]
    for _, path in steps(folder):
        if path not in own[-_KEPT:]:
            shutil.rmtree(path, ignore_errors=True)


def steps(folder: Path) -> list[tuple[int, Path]]:
    """Published steps, oldest first."""
    found = [(match, path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)


def load_newest(
    folder: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, inputs: dict[str, str]
) -> dict[str, Any] | None:
    """Load the newest step that is intact and was made from the same inputs; None if there is none."""
    for _, path in reversed(steps(folder)):
        if recorded_inputs(path) != inputs or not intact(path, deep=True):
            continue
        try:
            adapter, moments = (load_file(path / f"{name}.safetensors") for name in ("adapter", "optimizer"))
            state = read_json(path / "state.json")
        except (SafetensorError, OSError, UsageError):
            continue
        with torch.no_grad():
            for name, tensor in parameters.items():
                tensor.copy_(adapter[name])
                if f"step.{name}" in moments:
                    optimizer.state[tensor] = {
                        key: moments[f"{key}.{name}"].to("cpu" if key == "step" else tensor.device) for key in _STATE
                    }
        return state
    return None
