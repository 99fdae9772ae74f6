"""The hybrid model: one subclass per family, made from the family's own classes.

Nothing of a family's modeling code is copied. The causal LM class is subclassed; the base model and its decoder layers
take a mixin that hands each layer the mask of its own mixer, and the mixers are applied in place.
"""

import copy
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from layerboost.artifacts import LayerPlan, parse_layers
from layerboost.errors import CheckpointError
from layerboost.model.cache import fit_cache
from layerboost.model.config import (
    FAMILIES,
    PREFIX,
    base_config_class,
    check_plan,
    check_windows,
    config_class,
    hybrid_config,
    native_windows,
)
from layerboost.model.mixers import MixedLayer, apply_mixer, mixed

# transformers returns a mask that has four dimensions as it is: this keeps a base model from building masks that no
# layer reads, since every layer of a hybrid gets its own.
_NO_MASK = torch.empty(1, 1, 1, 1)


class MixedBase:
    """Mixin over a family's base model: one mask per window, and a cache that fits the plan."""

    config: Any
    layers: Any  # an nn.ModuleList of decoder layers
    layerboost_more_windows: frozenset[int | None] = frozenset()

    @contextmanager
    def also_masking(self, windows: Collection[int | None]) -> Iterator[None]:
        """Inside, layers are handed masks for these windows too, whether or not one of them has such a window."""
        self.layerboost_more_windows = frozenset(windows)
        try:
            yield
        finally:
            del self.layerboost_more_windows

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if isinstance(attention_mask, Tensor) and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask has {attention_mask.ndim} dimensions; a hybrid takes [batch, tokens], because each of "
                "its layers builds its own mask"
            )
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("input_ids and inputs_embeds are both missing; pass one of them")
            inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None  # type: ignore[attr-defined]
        checkpointing = self.training and getattr(self, "gradient_checkpointing", False)  # type: ignore[attr-defined]
        if use_cache is None:
            use_cache = bool(self.config.use_cache)
        use_cache = use_cache and not checkpointing
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        windows = [layer.layerboost_window for layer in self.layers]
        if past_key_values is not None:
            fit_cache(past_key_values, [layer.layerboost_plan for layer in self.layers], windows)
        masks = {
            window: self._mask(window, windows, inputs_embeds, attention_mask, past_key_values, position_ids)
            for window in {*windows, *self.layerboost_more_windows}
        }
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=_NO_MASK,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            layerboost_masks=masks,
            **kwargs,
        )

    def _mask(
        self,
        window: int | None,
        windows: list[int | None],
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
    ) -> Any:
        one_layer = None
        if past_key_values is not None:
            # the mask functions read the first layer of a cache; show them one that has this window
            alike = [i for i, w in enumerate(windows) if w == window]
            attending = [i for i in alike if self.layers[i].layerboost_plan.mixer != "no_attention"]
            one_layer = Cache(layers=[past_key_values.layers[(attending or alike)[0]]])
        arguments: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "past_key_values": one_layer,
            "position_ids": position_ids,
        }
        if window is None:
            return create_causal_mask(config=self.config, **arguments)
        config = copy.copy(self.config)
        config.sliding_window = window
        return create_sliding_window_causal_mask(config=config, **arguments)


class Hybrid(PreTrainedModel):
    """What every hybrid causal LM adds to its family's own class."""

    # buffers that old checkpoints carry and that the model computes itself
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_emb\.inv_freq"]

    @property
    def decoder_layers(self) -> Any:
        return self.base_model.layers

    @property
    def plan(self) -> list[LayerPlan]:
        return [layer.layerboost_plan for layer in self.decoder_layers]

    def mixed(self, changes: dict[int, LayerPlan]) -> AbstractContextManager[None]:
        """This model with other mixers in some layers, for as long as the context lasts; weights are shared."""
        native = native_windows(self.config)
        check_windows(changes, native)
        return mixed(self.decoder_layers, changes, native)

    def convert(self, layers: list[LayerPlan], provenance: dict[str, Any] | None = None) -> None:
        """Apply a plan for good, in place; what it removes is gone. Needs a model that still has every attention.

        Raises:
            PlanError: the plan does not fit the model.
        """
        config = hybrid_config(self.config, layers, provenance)
        native = native_windows(config)
        for index, (layer, plan) in enumerate(zip(self.decoder_layers, layers, strict=True)):
            apply_mixer(layer, index, plan, native[index])
        self.config.layerboost = config.layerboost

    def create_masks_for_generate(self, *, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        return attention_mask  # `generate` would build one mask for all layers; `MixedBase` builds one per window

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but missing, unexpected and misshapen tensors are errors, and nothing is unpickled.

        Raises:
            CheckpointError: the tensors are not exactly those that the plan asks for.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # so that all of them are reported
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_tensors(info, args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        return (model, info) if wants_info else model


def check_tensors(loading_info: dict[str, Any], source: Any) -> None:
    """Raises CheckpointError unless a checkpoint held exactly the tensors of the model it was loaded into."""
    for what, rule in (
        ("mismatched_keys", "tensors have another shape than the configuration says"),
        ("missing_keys", "the model needs tensors that are not there"),
        ("unexpected_keys", "there are tensors that the model has no place for"),
    ):
        if loading_info[what]:
            some = ", ".join(sorted(str(key) for key in loading_info[what])[:3])
            raise CheckpointError(
                f"{source}: {rule}: {some} ({len(loading_info[what])} in all); check that configuration and weights "
                "belong together, or convert the original model again"
            )


@cache
def model_class(family: str) -> type[Hybrid]:
    """The causal LM class of a family's hybrids.

    Raises:
        CheckpointError: the family is not supported.
    """
    config = config_class(family)
    base_class = MODEL_FOR_CAUSAL_LM_MAPPING[base_config_class(family)]

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base_class.__init__(self, config, *args, **kwargs)
        _install(self, config)

    return type(
        f"LayerBoost{base_class.__name__}",
        (Hybrid, base_class),
        {"config_class": config, "__init__": init, "__module__": __name__},
    )


@cache
def _with_mixin(mixin: type, cls: Any) -> Any:
    """The class keeps its name: device maps and FSDP find layers by it."""
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__})


def _install(model: Any, config: Any) -> None:
    spec = getattr(config, "layerboost", None)
    if not isinstance(spec, dict) or spec.get("schema") != 1:
        found = spec.get("schema") if isinstance(spec, dict) else spec
        raise CheckpointError(
            f"config.json: key layerboost must hold schema 1, found {found!r}; convert the model again"
        )
    layers = parse_layers(spec.get("layers"), "config.json: layerboost")
    check_plan(layers, config)
    native = native_windows(config)
    base = model.base_model
    base.__class__ = _with_mixin(MixedBase, base.__class__)
    for index, (layer, plan) in enumerate(zip(base.layers, layers, strict=True)):
        layer.__class__ = _with_mixin(MixedLayer, layer.__class__)
        apply_mixer(layer, index, plan, native[index])


def register() -> None:
    """Teach transformers' auto classes every family's hybrids; safe to repeat."""
    for family in FAMILIES:
        AutoConfig.register(PREFIX + family, config_class(family), exist_ok=True)
        AutoModelForCausalLM.register(config_class(family), model_class(family), exist_ok=True)


register()
