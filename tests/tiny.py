"""Models small enough to test with, and what a hybrid must compute, without any of the project's model code."""

from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost.artifacts import LayerPlan

FULL = LayerPlan(mixer="full_attention")
NONE = LayerPlan(mixer="no_attention")


def window(size):
    return LayerPlan(mixer="sliding_attention", window=size)


@lru_cache
def tokenizer():
    """Bytes and two special tokens."""
    vocabulary = {"<|end|>": 0, "<|pad|>": 1}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")


def make_model(family, seed=0, **changes):
    values = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
        "pad_token_id": 1, "tie_word_embeddings": family in ("qwen2", "qwen3"),
    } | ({"sliding_window": None} if family == "mistral" else {}) | changes  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # large enough that attention matters, and norms and biases that are not the identity
            parameter.normal_(std=0.25) if parameter.ndim > 1 else parameter.add_(0.2 * torch.randn_like(parameter))
            assert torch.isfinite(parameter).all(), name
    return model


def make_checkpoint(folder: Path, family, seed=0, dtype=torch.float32, **changes):
    make_model(family, seed, **changes).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def visible(tokens, size):
    """`[T, T]` bool written out position by position: query q sees key k if q - W < k <= q."""
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for q in range(tokens):
        for k in range(tokens):
            seen[q, k] = k <= q and (size is None or q - size < k)
    return seen


@torch.no_grad()
def reference_logits(folder, layers, tokens, padding=None):
    """What the plan must compute: the stock model, with hooks that replace its masks and silence its attentions.

    Args:
        padding: `[B, T]`, 0 where a token is padding.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    batch, length = tokens.shape
    padding = torch.ones_like(tokens) if padding is None else padding
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    native = getattr(model.config, "sliding_window", None)
    types = getattr(model.config, "layer_types", None) or ["sliding_attention" if native else "full_attention"] * len(
        layers
    )
    hooks = []
    for layer, plan, kind in zip(model.model.layers, layers, types, strict=True):
        size = plan.window or (native if kind == "sliding_attention" else None)
        seen = visible(length, size)[None, None] & padding.bool()[:, None, None, :]
        seen = seen | torch.eye(length, dtype=torch.bool)  # a padded query has to look somewhere
        mask = torch.zeros(batch, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)

        def replace_mask(_, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        hooks.append(layer.self_attn.register_forward_pre_hook(replace_mask, with_kwargs=True))
        if plan.mixer == "no_attention":
            hooks.append(layer.self_attn.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), out[1])))
    logits = model(tokens, position_ids=positions, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits


def some_tokens(batch, length, seed=0):
    return torch.randint(2, 258, (batch, length), generator=torch.Generator().manual_seed(seed))
