"""inspect: what a checkpoint is, in one screen."""

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from layerboost.artifacts import MANIFEST, intact
from layerboost.errors import CheckpointError
from layerboost.layer_plan import full_plan
from layerboost.model.config import check_plan, needs
from layerboost.model.loading import describe, find_model, is_hybrid, is_local, plan_of, read_config, weight_files


def run(path: Path) -> dict[str, Any]:
    """Facts about a hybrid, or about a model that could become one; weights are not loaded.

    Raises:
        CheckpointError: not a checkpoint that can be read.
    """
    if not is_local(path):
        raise CheckpointError(f"{path} is not a folder; name the folder of a checkpoint")
    path = find_model(path)
    config = read_config(path)
    layers = plan_of(config, path) if is_hybrid(config) else full_plan(config.num_hidden_layers)
    check_plan(layers, config)
    model = describe(path, path, config)
    parameters = 0
    for file in weight_files(path):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a mapping
                parameters += math.prod(opened.get_slice(name).get_shape())
    context = model.usual_context
    base = model.kv_bytes(full_plan(len(layers)), context)
    spec = getattr(config, "layerboost", None) or {}
    return {
        "name": model.name,
        "model_type": config.model_type,
        "hybrid": is_hybrid(config),
        "digest": model.digest,
        "parameters": parameters,
        "layers": [layer.entry() for layer in layers],
        "needs": needs(layers),
        "native_windows": model.native_windows,
        "context": model.context,
        "kv_bytes": {"context": context, "base": base, "hybrid": model.kv_bytes(layers, context)},
        "receptive_field": model.receptive_field(layers),
        "provenance": spec.get("provenance", {}),
        "intact": intact(path, deep=True) if (path / MANIFEST).exists() else None,
    }
