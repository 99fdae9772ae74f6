"""The configuration of a hybrid: the family's own, untouched, and the plan beside it."""

from functools import cache
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from layerboost.errors import CheckpointError, PlanError
from layerboost.layer_plan import LayerPlan, parse_layers
from layerboost.model.families import VERIFIED, windows_of

PREFIX = "layerboost_"


def family_of(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix(PREFIX)


def base_config_class(family: str) -> type[PreTrainedConfig]:
    """Raises CheckpointError if transformers has no causal language model of this name."""
    if family not in CONFIG_MAPPING or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"model_type {family!r} is not a causal language model of transformers; supported are "
            f"{', '.join(VERIFIED)} and families built alike"
        )
    return CONFIG_MAPPING[family]


def stock_class(family: str) -> Any:
    """The family's causal language model in transformers; raises CheckpointError if there is none."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[base_config_class(family)]


def empty_model(config: PreTrainedConfig) -> Any:
    """The stock model of a base configuration, without memory for its weights."""
    with torch.device("meta"):
        return stock_class(family_of(config))(config)


@cache
def config_class(family: str) -> type[PreTrainedConfig]:
    """The configuration class of a family's hybrids; raises CheckpointError if the family is not supported."""
    base = base_config_class(family)
    return type(
        f"LayerBoost{base.__name__}",
        (base,),
        {"model_type": PREFIX + family, "__module__": __name__, "__doc__": f"A hybrid of the {family} family."},
    )


def __getattr__(name: str) -> Any:
    """Configuration classes by their names: processes that are handed a configuration look its class up here."""
    kind = getattr(transformers, name.removeprefix("LayerBoost"), None) if name.startswith("LayerBoost") else None
    if kind is None or getattr(kind, "model_type", None) not in CONFIG_MAPPING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return config_class(kind.model_type)


def native_windows(config: PreTrainedConfig) -> list[int | None]:
    """What each layer of the original model sees, in tokens; None is everything."""
    return windows_of(config, stock_class(family_of(config)))


def check_windows(changes: dict[int, LayerPlan], native: list[int | None]) -> None:
    """Raises PlanError if a layer would see more than it did."""
    for index, plan in changes.items():
        limit = native[index]
        if limit is None:
            continue
        if plan.mixer == "linear_attention":
            raise PlanError(
                f"layer {index}: linear_attention looks further back than the layer's native window of {limit}; use "
                "sliding_attention, or full_attention, which keeps the native window"
            )
        if plan.window is not None and plan.window > limit:
            raise PlanError(
                f"layer {index}: window {plan.window} is wider than the layer's native window of {limit}; "
                "use a narrower window, or full_attention, which keeps the native one"
            )


def check_plan(layers: list[LayerPlan], config: PreTrainedConfig) -> None:
    """Raises PlanError if the plan does not fit a model of this configuration."""
    check_layers(layers, native_windows(config), config.max_position_embeddings)


def check_layers(layers: list[LayerPlan], native: list[int | None], context: int) -> None:
    """Raises PlanError if there are too many or too few, or one would see more than it did."""
    if len(layers) != len(native):
        raise PlanError(
            f"plan has {len(layers)} layers, model has {len(native)} (num_hidden_layers); plan again on this model"
        )
    for index, plan in enumerate(layers):
        if plan.window is not None and plan.window > context:
            raise PlanError(
                f"layer {index}: window {plan.window} is wider than the model's context of {context}; use "
                "full_attention"
            )
    check_windows(dict(enumerate(layers)), native)


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
    for key in ("model_type", "architectures", "layerboost", "transformers_version", "auto_map"):
        values.pop(key, None)
    made = made_class(**values)
    made.layerboost = {
        "schema": 1,
        "layers": [plan.entry() for plan in layers],
        "needs": needs(layers),
        "provenance": provenance or {},
    }
    return made


def needs(layers: list[LayerPlan]) -> list[str]:
    """What an engine has to know to run this plan, so that one that does not can refuse it."""
    windows = {plan.window for plan in layers if plan.mixer == "sliding_attention"}
    found: set[str] = {plan.mixer for plan in layers if plan.mixer != "full_attention"}
    found |= {f"linear_attention/{plan.variant}" for plan in layers if plan.variant}
    found |= {"several_windows"} if len(windows) > 1 else set()
    found |= {"sinks"} if any(plan.sink for plan in layers) else set()
    return sorted(found)


def layers_of(config: Any) -> list[LayerPlan]:
    """The plan in a hybrid's configuration.

    Raises:
        CheckpointError: there is none, or one of another schema.
        PlanError: an entry is wrong, or the plan does not fit the model.
    """
    spec = getattr(config, "layerboost", None)
    if not isinstance(spec, dict) or spec.get("schema") != 1:
        found = spec.get("schema") if isinstance(spec, dict) else spec
        raise CheckpointError(
            f"config.json: key layerboost must hold schema 1, found {found!r}; convert the model again"
        )
    layers = parse_layers(spec.get("layers"), "config.json: layerboost")
    check_plan(layers, config)
    return layers
