"""The hybrid model: one subclass per family, made from the family's own classes.

Nothing of a family's modeling code is copied. The causal LM class is subclassed; the base model takes a mixin that
tells the layers of padding and fits the cache, and the mixers are put into the layers' own attentions.
"""

import copy
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import MoeModelOutputWithPast

from layerboost.errors import CheckpointError
from layerboost.layer_plan import LayerPlan
from layerboost.model.cache import fit_cache
from layerboost.model.config import (
    PREFIX,
    check_windows,
    config_class,
    hybrid_config,
    layers_of,
    native_windows,
    stock_class,
)
from layerboost.model.families import Anatomy, anatomy_of
from layerboost.model.mixers import (
    MIXER,
    Sequences,
    apply_mixer,
    cache_argument,
    mixed,
    take_cache,
    with_mixin,
)

# transformers returns a mask that has four dimensions as it is: so a base model builds none where no layer reads one
_NO_MASK = torch.empty(1, 1, 1, 1)


class MixedBase:
    """Mixin over a family's base model: layers hear of padding, and the cache fits the plan."""

    config: Any
    layerboost_anatomy: Anatomy
    layerboost_cache_argument: str  # what this version of transformers calls the cache

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        past = take_cache(kwargs)
        plan = plan_in_place(self)
        untouched = all(layer.mixer == "full_attention" for layer in plan)
        if not (
            untouched or attention_mask is None or (isinstance(attention_mask, Tensor) and attention_mask.ndim == 2)
        ):
            found = f"{attention_mask.ndim} dimensions" if isinstance(attention_mask, Tensor) else "another type"
            raise ValueError(
                f"attention_mask has {found}; a hybrid takes [batch, tokens], because each of its layers sees in its "
                "own way"
            )
        if kwargs.get("output_attentions") and not untouched:
            raise ValueError("output_attentions: mixers other than full attention have no attention weights to give")
        packed = None
        if position_ids is not None and position_ids.ndim == 2 and attention_mask is None and past is None:
            packed = find_packed_sequence_indices(position_ids)
        checkpointing = self.training and getattr(self, "gradient_checkpointing", False)  # type: ignore[attr-defined]
        if use_cache is None:
            use_cache = bool(self.config.use_cache)
        # nothing can follow rows that hold several sequences, and a cache would make one of them
        use_cache = use_cache and not checkpointing and packed is None
        if use_cache and past is None:
            past = DynamicCache(config=self.config)
        if past is not None:
            fit_cache(past, self.config, plan)
        kwargs[self.layerboost_cache_argument] = past
        if untouched:  # all the rest is the family's own
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        reads_a_mask = any(layer.mixer == "full_attention" for layer in plan)
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask if reads_a_mask else _NO_MASK,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            layerboost=Sequences(attention_mask, packed),
            **kwargs,
        )


def plan_in_place(base: Any) -> list[LayerPlan]:
    """What the layers of a base model have now, `mixed` included."""
    return [layer.layerboost_plan for layer in getattr(base, base.layerboost_anatomy.layers)]


def has_soft_cap(config: Any) -> bool:
    return bool(getattr(config, "attn_logit_softcapping", None))


class Hybrid(PreTrainedModel):
    """What every hybrid causal LM adds to its family's own class."""

    @property
    def anatomy(self) -> Anatomy:
        return self.base_model.layerboost_anatomy

    @property
    def decoder_layers(self) -> Any:
        return getattr(self.base_model, self.anatomy.layers)

    @property
    def final_norm(self) -> Any:
        return getattr(self.base_model, self.anatomy.final_norm)

    @property
    def plan(self) -> list[LayerPlan]:
        return plan_in_place(self.base_model)

    def own_mixers(self) -> dict[int, nn.Module]:
        """Per layer, the mixer's module, where it has parameters of its own."""
        found = {}
        for index, layer in enumerate(self.decoder_layers):
            mixer = getattr(layer, self.anatomy.attention)._modules.get(MIXER)
            if mixer is not None and next(mixer.parameters(), None) is not None:
                found[index] = mixer
        return found

    def mixed(
        self, changes: dict[int, LayerPlan], mixers: dict[int, nn.Module] | None = None
    ) -> AbstractContextManager[None]:
        """This model with other mixers in some layers, for as long as the context lasts; weights are shared.

        Args:
            mixers: modules with the mixers' own parameters; layers without one get a fresh one.
        """
        check_windows(changes, native_windows(self.config))
        return mixed(self.decoder_layers, changes, self.anatomy, mixers)

    def convert(
        self,
        layers: list[LayerPlan],
        provenance: dict[str, Any] | None = None,
        mixers: dict[int, nn.Module] | None = None,
    ) -> None:
        """Apply a plan for good, in place; what it removes is gone. Needs a model that still has every attention.

        Raises:
            PlanError: the plan does not fit the model.
        """
        config = hybrid_config(self.config, layers, provenance)
        for index, (layer, plan) in enumerate(zip(self.decoder_layers, layers, strict=True)):
            apply_mixer(layer, index, plan, self.anatomy, (mixers or {}).get(index))
        self.config.layerboost = config.layerboost

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        """transformers' SDPA leaves soft caps out without a word: a model that has them runs on its eager attention."""
        if has_soft_cap(self.config):
            raise ValueError("SDPA ignores attn_logit_softcapping; use eager or flex_attention")
        return super()._sdpa_can_dispatch(is_init_check)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Fit the cache before anything is asked of its layers, as assisted decoding does."""
        done = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = take_cache(dict(model_kwargs))
        if isinstance(cache, Cache):
            fit_cache(cache, self.config, self.plan)
            if getattr(generation_config, "is_assistant", False) and hasattr(cache, "activate_past_recording"):
                cache.activate_past_recording()
        return done

    def create_masks_for_generate(self, *, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        return attention_mask  # `generate` would build masks in advance; the base model does it with the cache fitted

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


class LogitsHead(nn.Module):
    """A causal LM's way from final hidden states to logits: its head with all scales and caps, `[K, E]` to `[K, V]`.

    It shares the model's weights, and runs the family's own code.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.out_features = model.config.vocab_size
        clone = copy.copy(model)
        clone.__dict__ = vars(model) | {"_modules": dict(model._modules)}
        given = _Given()
        clone._modules[model.base_model_prefix] = given
        self.__dict__.update(clone=clone, given=given)  # no children: the parameters are the model's

    def forward(self, hidden: Tensor) -> Tensor:
        given = self.__dict__["given"]
        given.hidden = hidden[None]
        try:
            return self.__dict__["clone"](inputs_embeds=given.hidden, use_cache=False).logits.squeeze(0)
        finally:
            given.hidden = None


class _Given(nn.Module):
    """A base model that has computed already."""

    hidden: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return _Computed(last_hidden_state=self.hidden)


class _Computed(MoeModelOutputWithPast):
    """All that some family's head asks for besides."""

    cross_attentions = None


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
    config, base_class = config_class(family), stock_class(family)

    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base_class.__init__(self, config, *args, **kwargs)
        _install(self, config)

    made = type(
        f"LayerBoost{base_class.__name__}",
        (Hybrid, base_class),
        {
            "config_class": config,
            "__init__": init,
            "__module__": __name__,
            "_keys_to_ignore_on_load_unexpected": [
                *(base_class._keys_to_ignore_on_load_unexpected or ()),
                r"rotary_emb\.inv_freq",  # which old checkpoints carry, and the model computes itself
            ],
        },
    )
    # some families' checkpoints name or shape their tensors in another way than the model does (experts, for instance)
    for theirs, ours in ((base_class.__name__, made.__name__), (family, config.model_type)):
        conversion = get_checkpoint_conversion_mapping(theirs)
        if conversion is not None:
            register_checkpoint_conversion_mapping(ours, conversion, overwrite=True)
    return made


def _install(model: Any, config: Any) -> None:
    layers = layers_of(config)
    base = model.base_model
    base.layerboost_anatomy = anatomy_of(base)
    base.layerboost_cache_argument = cache_argument(base.forward)
    base.__class__ = with_mixin(MixedBase, base.__class__)
    for index, (layer, plan) in enumerate(zip(model.decoder_layers, layers, strict=True)):
        apply_mixer(layer, index, plan, model.anatomy)


def register(family: str) -> None:
    """Teach transformers' auto classes a family's hybrids; safe to repeat."""
    AutoConfig.register(PREFIX + family, config_class(family), exist_ok=True)
    AutoModelForCausalLM.register(config_class(family), model_class(family), exist_ok=True)
