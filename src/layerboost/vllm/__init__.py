"""Hybrids on vLLM: the plugin, the model, the layout of its cache. This file and `kv` import no vLLM."""

import importlib.util

from layerboost.errors import EnvironmentTrouble, PlanError
from layerboost.layer_plan import LayerPlan


def require_vllm() -> None:
    """Raises EnvironmentTrouble if vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise EnvironmentTrouble(
            "vLLM is not installed; pip install 'layerboost[vllm]', or `make vllm` for its CPU build"
        )


def check_servable(layers: list[LayerPlan]) -> None:
    """Raises PlanError if vLLM cannot run this plan."""
    linear = [index for index, plan in enumerate(layers) if plan.mixer == "linear_attention"]
    if linear:
        raise PlanError(
            f"layer {linear[0]}: linear_attention has no state cache in vLLM; serve this checkpoint with transformers, "
            "or plan with full, sliding and no attention"
        )
    if all(plan.mixer == "no_attention" for plan in layers):
        raise PlanError("no layer has attention; vLLM needs at least one with a cache")
