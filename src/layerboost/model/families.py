"""What a family's model is made of, found by looking at it: no list decides, and no modeling code is copied.

The parts are found by name and class; whether a norm serves attention alone is found by running one decoder layer with
its parts replaced by stand-ins, which costs nothing and works for weights that are not loaded yet.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from layerboost.errors import CheckpointError

# Families that every contract test runs on. Others are accepted if their anatomy is found, and said to be unverified.
VERIFIED = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "starcoder2", "granite", "olmo2", "smollm3",
    "cohere2", "gpt_neox", "qwen3_moe", "mixtral",
)  # fmt: skip

_PASSED_ON = "layerboost"  # what a mixed attention is told of padding travels under this name
_KNOWN_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class Anatomy:
    """Names of a family's parts.

    Attributes:
        layers: of the decoder layers in the base model.
        attention: of the attention in a decoder layer.
        before, after: in a decoder layer, the norms that serve attention alone and go with it.
        final_norm: of the norm after the last layer, in the base model.
    """

    layers: str
    attention: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    final_norm: str

    @property
    def norms(self) -> tuple[str, ...]:
        return self.before + self.after


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of this configuration cannot become a hybrid, as far as the configuration tells; None if it can."""
    types = set(getattr(config, "layer_types", None) or [])
    if config.get_text_config() is not config:
        return "it is a model of several parts; only text models are supported"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if types - _KNOWN_TYPES:
        return (
            f"its layers have mixers other than softmax attention already ({', '.join(sorted(types - _KNOWN_TYPES))})"
        )
    if getattr(config, "kv_lora_rank", None):
        return "its attention caches a latent in place of keys and values (MLA)"
    if getattr(config, "num_kv_shared_layers", 0):
        return "its layers share keys and values with one another"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    return None


def anatomy_of(base: Any) -> Anatomy:
    """The parts of a base model (the causal LM without its head).

    Raises:
        CheckpointError: the model is not built in a way that can be converted faithfully; says why.
    """
    config = base.config
    reason = refusal(config)
    if reason:
        raise CheckpointError(f"{config.model_type} models cannot be converted: {reason}")

    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"{config.model_type} models cannot be converted: {reason}")

    stacks = [
        name
        for name, child in base.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers
    ]
    if len(stacks) != 1:
        raise refuse("no single list of decoder layers was found")
    layers = getattr(base, stacks[0])
    attentions = {tuple(_attentions(layer)) for layer in layers}
    if len(attentions) != 1 or len(next(iter(attentions))) != 1:
        raise refuse("not every decoder layer has one softmax attention, under one name")
    attention = next(iter(attentions))[0]
    for layer in layers:
        module = getattr(layer, attention)
        if "ALL_ATTENTION_FUNCTIONS" not in inspect.getsource(type(module).forward):
            raise refuse("its attention does not go through transformers' attention interface")
        if not getattr(module, "is_causal", True):
            raise refuse("its attention is not causal")
    norms = [name for name, child in base.named_children() if _is_norm(child)]
    if len(norms) != 1:
        raise refuse("no single norm after the last layer was found")
    try:
        own = {_norms_of_attention(layer, attention, config.hidden_size) for layer in layers}
    except Exception as trouble:  # whatever a layer's code runs into among stand-ins
        first = (str(trouble).splitlines() or [type(trouble).__name__])[0]
        raise refuse(f"its decoder layer could not be followed ({first[:120]})") from None
    if len(own) != 1:
        raise refuse("its decoder layers differ in their norms")
    return Anatomy(stacks[0], attention, *next(iter(own)), norms[0])


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _attentions(layer: nn.Module) -> list[str]:
    return [
        name
        for name, child in layer.named_children()
        if "Attention" in type(child).__name__ and hasattr(child, "layer_idx")
    ]


class _StandIn(nn.Module):
    """In place of a part of a layer: notes what it was given, and gives back what it is told."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer
        self.given: Any = None
        self.gave: Any = None
        self.told: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.given = args[0] if args else kwargs["hidden_states"]
        self.told = kwargs.get(_PASSED_ON)
        self.gave = self.answer(self.given)
        return self.gave


def _norms_of_attention(layer: Any, attention: str, hidden_size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Norms that serve attention alone: the one before it, unless something else reads it too, and those after it."""
    parts, _ = _follow(layer, attention, hidden_size)
    if parts[attention].told is None:
        raise NotImplementedError("it hands no further arguments to its attention")
    given, result = parts[attention].given, parts[attention].gave[0]
    candidates = [n for n, part in parts.items() if n != attention and _is_norm(getattr(layer, n))]
    before = [n for n in candidates if parts[n].gave is given]
    after = [n for n in candidates if parts[n].given is result]
    unshared = []
    for name in before:
        _, plain = _follow(layer, attention, hidden_size, silent=True)
        _, shifted = _follow(layer, attention, hidden_size, silent=True, shift=name)
        if torch.equal(plain, shifted):
            unshared.append(name)
    return tuple(unshared), tuple(after)


def _follow(
    layer: Any, attention: str, hidden_size: int, *, silent: bool = False, shift: str | None = None
) -> tuple[dict[str, _StandIn], Tensor]:
    """Run a layer whose parts are stand-ins.

    Args:
        silent: the attention answers zeros.
        shift: a part whose answer is moved by one.
    """
    try:
        return _run(layer, attention, hidden_size, silent, shift, pairs=False)
    except (TypeError, ValueError):  # experts of some families answer with their routing as well
        return _run(layer, attention, hidden_size, silent, shift, pairs=True)


def _run(
    layer: Any, attention: str, hidden_size: int, silent: bool, shift: str | None, pairs: bool
) -> tuple[dict[str, _StandIn], Tensor]:
    def answer(name: str) -> Callable[[Tensor], Any]:
        def respond(x: Tensor) -> Any:
            if name == attention:
                return (torch.zeros_like(x) if silent else x * 3 + 1), None
            found = x * 2 + (1 if name == shift else 0)
            return (found, None) if pairs and not _is_norm(layer._modules[name]) else found

        return respond

    with torch.device("cpu"), torch.no_grad():
        parts = {name: _StandIn(answer(name)) for name in layer._modules}
        clone = copy.copy(layer)
        clone.__dict__ = vars(layer) | {"_modules": parts}
        position = torch.arange(2)[None]
        rotary = (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
        given = {
            "attention_mask": None, "position_ids": position, "cache_position": position[0], "use_cache": False,
            "past_key_values": None, "cache": None, "layer_past": None, "position_embeddings": rotary,
        }  # fmt: skip
        wanted = inspect.signature(type(layer).forward).parameters
        arguments = {key: value for key, value in given.items() if key in wanted}
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values()):
            arguments[_PASSED_ON] = True
        out = type(layer).forward(clone, torch.linspace(-1, 1, 2 * hidden_size).view(1, 2, hidden_size), **arguments)
    return parts, out[0] if isinstance(out, tuple) else out


def windows_of(config: PreTrainedConfig, model_class: Any) -> list[int | None]:
    """What each layer of the original model sees, in tokens; None is everything."""
    window = getattr(config, "sliding_window", None)
    modeling = sys.modules[model_class.__module__]
    if (
        not window
        or window >= config.max_position_embeddings
        or not hasattr(modeling, "create_sliding_window_causal_mask")
    ):
        return [None] * config.num_hidden_layers
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]


def first_tensor(output: Any) -> Tensor:
    """A layer's hidden states, whether it answers with them alone or in a tuple."""
    return output[0] if isinstance(output, tuple) else output
