"""Hybrids on vLLM: any of its own decoder classes, with the plan put in while it is built. No modeling code is copied.

A class is made for the name vLLM asks this module for. While the stock constructor runs, attentions get the plan's
windows and sinks, and those that are removed become empty: they claim no cache, and their projections no memory.
"""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer
from vllm import ModelRegistry
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.utils import PPMissingLayer, extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from layerboost.errors import CheckpointError, PlanError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import empty_model, family_of, layers_of
from layerboost.model.families import VERIFIED, Anatomy, anatomy_of
from layerboost.model.mixers import MIXER
from layerboost.vllm import check_servable

_NOT_IN_FLOAT16 = ("gemma2", "gemma3_text", "glm4")  # which vLLM itself refuses by the name that a hybrid changes
_PREFIX = "LayerBoost"
_logger = init_logger(__name__)
_PROJECTIONS = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def __getattr__(name: str) -> Any:
    if not name.startswith(_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid_class(name.removeprefix(_PREFIX))


@cache
def hybrid_class(stock: str) -> type[nn.Module]:
    """The hybrid of one of vLLM's classes, by the name that transformers and vLLM share.

    Raises:
        AttributeError: vLLM has no class of its own under this name.
    """
    if stock not in ModelRegistry.models:
        raise AttributeError(f"vLLM has no class {stock} of its own; it cannot serve hybrids of this family")
    base: Any = ModelRegistry.models[stock].load_model_cls()

    def init(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        layers = layers_of(config)
        check_servable(layers)
        family = family_of(config)
        if family in _NOT_IN_FLOAT16 and vllm_config.model_config.dtype == torch.float16:
            raise CheckpointError(f"{family} overflows in float16; use --dtype bfloat16 or float32")
        if family not in VERIFIED:  # whose tests run on vLLM as well
            _logger.warning("LayerBoost has no tests of %s on vLLM; try it with `layerboost verify`", family)
        stock_model = _stock_model(config)
        anatomy = anatomy_of(stock_model.base_model)
        _register_decoder(type(config), type(stock_model.base_model))
        with _plan_in_place(layers, anatomy):
            base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.layerboost_anatomy, self.layerboost_parts = anatomy, _parts(stock_model, layers, anatomy)
        for layer, plan in zip(_decoder_layers(self, len(layers), anatomy), layers, strict=True):
            if isinstance(layer, PPMissingLayer):
                continue
            if plan.mixer == "no_attention":
                _remove_attention(layer, anatomy)
            elif plan.sink:
                _name_sinks(getattr(layer, anatomy.attention))

    def load_weights(self: Any, weights: Iterable[tuple[str, Tensor]]) -> Any:
        seen: set[tuple[int, str]] = set()
        loaded = base.load_weights(self, _noted(weights, self.layerboost_anatomy, seen))
        missing = sorted(self.layerboost_parts - seen)
        if missing:
            index, part = missing[0]
            raise CheckpointError(
                f"the checkpoint has no tensor for {part} of layer {index}'s attention ({len(missing)} such in all); "
                "fetch it again"
            )
        return loaded

    members = {"__init__": init, "load_weights": load_weights, "__module__": __name__}
    return type(f"{_PREFIX}{stock}", (base,), members)


def _register_decoder(config_class: Any, stock_decoder: Any) -> None:
    """Classes that vLLM takes from transformers build their layers from what is registered for their configuration."""
    decoder = type(stock_decoder.__name__, (stock_decoder,), {"config_class": config_class})
    AutoModel.register(config_class, decoder, exist_ok=True)


def _stock_model(config: Any) -> Any:
    """The family's model in transformers, without memory for its weights."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return empty_model(config)
    finally:
        torch.set_default_dtype(dtype)


@contextlib.contextmanager
def _plan_in_place(layers: list[LayerPlan], anatomy: Anatomy) -> Iterator[None]:
    """Attentions that are built meanwhile follow the plan; the projections of removed ones are built without memory."""
    attention = Attention.__init__

    def attention_init(self: Any, *args: Any, **kwargs: Any) -> None:
        plan = layers[extract_layer_index(kwargs["prefix"])]
        if plan.mixer == "no_attention":
            nn.Module.__init__(self)  # not known to the engine, so that no cache is made for it
            return
        if plan.mixer == "sliding_attention":
            kwargs["per_layer_sliding_window"] = plan.window
        if plan.sink:
            kwargs["sinks"] = _new_sinks(args[0] if args else kwargs["num_heads"])
        attention(self, *args, **kwargs)

    removed = re.compile(rf"\.(\d+)\.{anatomy.attention}\.")

    def without_memory(init: Callable[..., None]) -> Callable[..., None]:
        def projection_init(self: Any, *args: Any, prefix: str = "", **kwargs: Any) -> None:
            found = removed.search(prefix)
            gone = found is not None and layers[int(found[1])].mixer == "no_attention"
            with torch.device("meta") if gone else contextlib.nullcontext():
                init(self, *args, prefix=prefix, **kwargs)

        return projection_init

    with contextlib.ExitStack() as stack:
        for cls in _PROJECTIONS:
            stack.enter_context(_replaced(cls, without_memory(cls.__init__)))
        stack.enter_context(_replaced(Attention, attention_init))
        yield


@contextlib.contextmanager
def _replaced(cls: Any, init: Callable[..., None]) -> Iterator[None]:
    original = cls.__init__
    cls.__init__ = init
    try:
        yield
    finally:
        cls.__init__ = original


def _parts(stock_model: Any, layers: list[LayerPlan], anatomy: Anatomy) -> set[tuple[int, str]]:
    """Parts of attentions that a checkpoint must have tensors for, such as (3, `q_proj`).

    vLLM itself does not miss a projection that is not there: it serves whatever the memory held.
    """
    stack = getattr(stock_model.base_model, anatomy.layers)
    return {
        (index, part)
        for index, (layer, plan) in enumerate(zip(stack, layers, strict=True))
        for part, module in getattr(layer, anatomy.attention).named_children()
        if plan.mixer != "no_attention" and next(module.parameters(), None) is not None
    }


def _noted(
    weights: Iterable[tuple[str, Tensor]], anatomy: Anatomy, seen: set[tuple[int, str]]
) -> Iterator[tuple[str, Tensor]]:
    of_attention = re.compile(rf"(?:^|\.){anatomy.layers}\.(\d+)\.{anatomy.attention}\.(\w+)\.")
    for name, tensor in weights:
        found = of_attention.search(name)
        if found:
            seen.add((int(found[1]), found[2]))
        yield name, tensor


def _decoder_layers(model: nn.Module, count: int, anatomy: Anatomy) -> nn.ModuleList:
    def is_stack(module: nn.Module) -> bool:
        return (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and all(isinstance(layer, PPMissingLayer) or hasattr(layer, anatomy.attention) for layer in module)
        )

    found = [module for module in model.modules() if is_stack(module)]
    if len(found) != 1:
        raise PlanError(f"{type(model).__name__}: {len(found)} lists of {count} decoder layers were found, not one")
    return cast(nn.ModuleList, found[0])


def _remove_attention(layer: nn.Module, anatomy: Anatomy) -> None:
    missing = [name for name in (anatomy.attention, *anatomy.norms) if not hasattr(layer, name)]
    if missing:
        raise PlanError(f"{type(layer).__name__} of vLLM has no {missing[0]}; hybrids of this family cannot be served")
    # decoder layers of transformers unpack what their attention answers
    setattr(layer, anatomy.attention, NoAttention(with_weights=isinstance(layer, GradientCheckpointingLayer)))
    for name in anatomy.before:
        setattr(layer, name, AddOnly())
    for name in anatomy.after:
        setattr(layer, name, nn.Identity())


def _new_sinks(heads: int) -> nn.Parameter:
    """A learned logit for each head of this rank, `[heads]`, in the model's dtype."""
    sinks = nn.Parameter(torch.empty(heads), requires_grad=False)
    set_weight_attrs(sinks, {"weight_loader": sharded_weight_loader(0)})
    return sinks


def _name_sinks(attention: nn.Module) -> None:
    """Put the sinks that an attention runs with where the checkpoint has them."""
    runs: Any = next(module for module in attention.modules() if isinstance(module, Attention))
    mixer = nn.Module()
    mixer.register_parameter("sink", runs.impl.sinks)
    setattr(attention, MIXER, mixer)


class NoAttention(nn.Module):
    """Answers zeros, as large as the hidden states it is given among its arguments."""

    def __init__(self, with_weights: bool) -> None:
        super().__init__()
        self.with_weights = with_weights

    def forward(self, *args: Any, hidden_states: Tensor | None = None, **_: Any) -> Tensor | tuple[Tensor, None]:
        zeros = torch.zeros_like(args[-1] if hidden_states is None else hidden_states)
        return (zeros, None) if self.with_weights else zeros


class AddOnly(nn.Module):
    """What is left of vLLM's fused addition and norm when nobody reads the norm."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return x if residual is None else (x, x + residual)
