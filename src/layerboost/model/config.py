"""The configuration of a hybrid: the family's own, untouched, and the plan beside it."""

from functools import cache
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost.artifacts import LayerPlan
from layerboost.errors import CheckpointError, PlanError

# Supported families, and whether the family's own code ever windows a layer.
FAMILIES = {"llama": False, "mistral": True, "qwen2": True, "qwen3": True}
PREFIX = "layerboost_"


def family_of(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix(PREFIX)


def base_config_class(family: str) -> type[PreTrainedConfig]:
    """Raises CheckpointError if the family is not supported."""
    if family not in FAMILIES:
        raise CheckpointError(
            f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)} and their hybrids"
        )
    return CONFIG_MAPPING[family]


@cache
def config_class(family: str) -> type[PreTrainedConfig]:
    """The configuration class of a family's hybrids; raises CheckpointError if the family is not supported."""
    base = base_config_class(family)
    return type(
        f"LayerBoost{base.__name__}",
        (base,),
        {"model_type": PREFIX + family, "__module__": __name__, "__doc__": f"A hybrid of the {family} family."},
    )


def native_windows(config: PreTrainedConfig) -> list[int | None]:
    """What each layer of the original model sees, in tokens; None is everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or not FAMILIES[family_of(config)]:
        return [None] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def check_windows(changes: dict[int, LayerPlan], native: list[int | None]) -> None:
    """Raises PlanError if a window is wider than the one the layer had."""
    for index, plan in changes.items():
        limit = native[index]
        if plan.window is not None and limit is not None and plan.window > limit:
            raise PlanError(
                f"layer {index}: window {plan.window} is wider than the layer's native window of {limit}; "
                "use a narrower window, or full_attention, which keeps the native one"
            )


def check_plan(layers: list[LayerPlan], config: PreTrainedConfig) -> None:
    """Raises PlanError if the plan does not fit a model of this configuration."""
    if len(layers) != config.num_hidden_layers:
        raise PlanError(
            f"plan has {len(layers)} layers, model has {config.num_hidden_layers} (num_hidden_layers); plan again on "
            "this model"
        )
    check_windows(dict(enumerate(layers)), native_windows(config))


def hybrid_config(config: PreTrainedConfig, layers: list[LayerPlan], provenance: dict[str, Any] | None = None) -> Any:
    """The configuration of a hybrid of this base model.

    Raises:
        CheckpointError: the model's family is not supported.
        PlanError: the plan does not fit the model.
    """
    family = family_of(config)
    made_class = config_class(family)
    check_plan(layers, config)
    values = config.to_dict()
    for key in ("model_type", "architectures", "layerboost", "transformers_version"):
        values.pop(key, None)
    made = made_class(**values)
    made.layerboost = {
        "schema": 1,
        "layers": [plan.entry() for plan in layers],
        "provenance": provenance or {},
    }
    return made
