"""serve: a checkpoint on stock vLLM, after the checks that make failures short."""

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path

from layerboost.artifacts import check_intact
from layerboost.errors import EnvironmentTrouble
from layerboost.layer_plan import LayerPlan
from layerboost.model.loading import find_model, is_hybrid, is_local, load_tokenizer, plan_of, read_config, weight_files
from layerboost.vllm import check_servable, require_vllm
from layerboost.vllm.kv import good_block_size

_GROUP = "vllm.general_plugins"
_SHARE_OF_MEMORY = "0.4"  # vLLM asks for nearly all of it, and on CPU does not start where other programs run


def run(path: str | Path, flags: list[str]) -> None:
    """Check, then become vLLM's OpenAI server; does not return.

    Args:
        flags: for vLLM, which win over what is set here.

    Raises:
        CheckpointError: no whole checkpoint.
        PlanError: vLLM cannot run the plan.
        EnvironmentTrouble: vLLM is missing, or does not know LayerBoost.
    """
    command = server_command(path, flags)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *command])


def server_command(path: str | Path, flags: list[str]) -> list[str]:
    """What `run` hands to Python, after all checks."""
    require_vllm()
    folder = find_model(path)
    config = read_config(folder, quantised=True)
    weight_files(folder)
    load_tokenizer(folder)
    check_intact(folder)
    layers: list[LayerPlan] = []
    if is_hybrid(config):
        layers = plan_of(config, folder)
        check_servable(layers)
        _check_plugin()
    defaults = {"--host": "127.0.0.1", "--served-model-name": folder.resolve().name if is_local(path) else str(path)}
    if _on_cpu():
        defaults["--block-size"] = str(good_block_size(layers, on_cpu=True))
        defaults["--gpu-memory-utilization"] = _SHARE_OF_MEMORY
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    ours = [part for flag, value in defaults.items() if flag not in given for part in (flag, value)]
    return ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *ours, *flags]


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _check_plugin() -> None:
    if not any(point.name == "layerboost" for point in entry_points(group=_GROUP)):
        raise EnvironmentTrouble("vLLM cannot find LayerBoost: the package is not installed; pip install it")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "layerboost" not in allowed.split(","):
        raise EnvironmentTrouble(f"VLLM_PLUGINS={allowed!r} leaves LayerBoost out; add layerboost to it, or unset it")
