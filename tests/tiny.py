"""Models small enough to test with, and what a hybrid must compute, without any of the project's model code."""

import copy
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost.layer_plan import LayerPlan

FULL = LayerPlan(mixer="full_attention")
NONE = LayerPlan(mixer="no_attention")


def window(size, sink=False):
    return LayerPlan(mixer="sliding_attention", window=size, sink=sink)


def linear(variant, window=None, feature_map=None):
    return LayerPlan(mixer="linear_attention", variant=variant, window=window, feature_map=feature_map)


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


def beginning_tokenizer():
    """The same, but with a token before every text, as Gemma and Llama have."""
    made = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    made.post_processor = processors.TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", BEGIN)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|pad|>", eos_token="<|end|>")


BEGIN = 1
SIZES = {
    "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 1,
}  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"] * 2

# Every verified family, with what its tiny model has beside the common sizes: native windows, multipliers, caps,
# experts. The contract tests run on each row.
FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {
        "sliding_window": 9, "layer_types": ALTERNATING, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 12,
        "final_logit_softcapping": 10.0,
    },
    "gemma3_text": {"sliding_window": 9, "layer_types": ALTERNATING, "query_pre_attn_scalar": 12},
    "phi3": {},
    "starcoder2": {"use_bias": True, "sliding_window": None},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0,
        "attention_bias": True,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 0, 1]},
    "cohere2": {"sliding_window": 9, "layer_types": ALTERNATING, "logit_scale": 0.5},
    "gpt_neox": {"use_parallel_residual": True, "tie_word_embeddings": False},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip


def make_model(family, seed=0, **changes):
    torch.manual_seed(seed)
    depth = changes.get("num_hidden_layers", SIZES["num_hidden_layers"])
    per_layer = ("layer_types", "no_rope_layers")  # as long as the model is deep
    row = {k: (v * depth)[:depth] if k in per_layer else v for k, v in FAMILIES.get(family, {}).items()}
    config = CONFIG_MAPPING[family](**(SIZES | row | changes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
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


def native_windows(config, layers):
    """Written out again: what the stock model of this configuration sees."""
    native = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention" if native else "full_attention"] * layers
    return [native if kind == "sliding_attention" else None for kind in types]


def attention_of(layer):
    return next(getattr(layer, name) for name in ("self_attn", "attention", "attn") if hasattr(layer, name))


@torch.no_grad()
def reference_logits(folder, layers, tokens, padding=None, mixers=None):
    """What the plan must compute: the stock model, with hooks that replace its masks and silence its attentions, and
    all weights of linear attention and of sinks written out.

    Args:
        padding: `[B, T]`, 0 where a token is padding.
        mixers: per layer, the module with its mixer's own parameters.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    batch, length = tokens.shape
    padding = torch.ones_like(tokens) if padding is None else padding
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    stack = model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h
    for index, (layer, plan, native) in enumerate(
        zip(stack, layers, native_windows(model.config, len(layers)), strict=True)
    ):
        size = plan.window or native
        seen = visible(length, size)[None, None] & padding.bool()[:, None, None, :]
        seen = seen | torch.eye(length, dtype=torch.bool)  # a padded query has to look somewhere
        mask = torch.zeros(batch, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)

        def replace_mask(_, args, kwargs, mask=mask):
            return args, kwargs | {"attention_mask": mask}

        attention = attention_of(layer)
        attention.register_forward_pre_hook(replace_mask, with_kwargs=True)
        if plan.mixer == "no_attention":
            # norms after an attention have no bias: they make zero of zero
            attention.register_forward_hook(lambda _, __, out: (torch.zeros_like(out[0]), out[1]))
        if plan.mixer == "linear_attention" or plan.sink:
            function = written_out(plan, mixers[index], padding, model.config, attention)
            name = f"written out {index}"
            ALL_ATTENTION_FUNCTIONS.register(name, function)
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = name
    return model(tokens, position_ids=positions, use_cache=False).logits


def written_out(plan, mixer, padding, config, attention):
    """An attention function with every weight `[B, H, T, T]`, from the papers' formulas."""
    inputs = {}
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )

    def function(module, q, k, v, mask, scaling=None, softcap=None, **_):
        heads, length = q.shape[1], q.shape[2]
        k, v = (t.repeat_interleave(heads // k.shape[1], 1) for t in (k, v))
        there = padding.bool()[:, None, None, :]
        scores = q @ k.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        near = visible(length, plan.window) & there
        if plan.sink:
            weights = scores.masked_fill(~near, float("-inf")).exp()
            total = weights.sum(-1, keepdim=True) + mixer.sink.exp()[None, :, None, None]
        elif plan.variant == "gla":
            weights = gated_weights(mixer, q, k, inputs["x"], padding)
            total = weights.sum(-1, keepdim=True)
        else:
            weights = kernel_weights(plan, mixer, q, k, scaling)
            weights = weights * (visible(length, None) & there)
            if plan.window:
                top = scores.masked_fill(~near, float("-inf")).amax(-1, keepdim=True)
                soft = (scores - top).exp() * near
                share = mixer.share.sigmoid()[None, :, None, None]
                weights = share * soft + (1 - share) * weights * ~visible(length, plan.window)
            total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 0.0)
        return (weights @ v).transpose(1, 2), weights

    return function


def kernel_weights(plan, mixer, q, k, scaling):
    groups = q.shape[1]
    if plan.feature_map == "elu":
        fq, fk = (torch.where(x > 0, x + 1, x.exp()) for x in (q, k))
    elif plan.feature_map == "hedgehog":
        wq = mixer.map_q.weight
        wk = mixer.map_k.weight.repeat_interleave(groups // mixer.map_k.weight.shape[0], 0)
        fq, fk = (torch.cat([(x @ w).softmax(-1), (-(x @ w)).softmax(-1)], -1) for x, w in ((q, wq), (k, wk)))
    else:
        w = mixer.map_q.directions
        fq, fk = ((x @ w.T - (x**2).sum(-1, keepdim=True) / 2).exp() for x in (q * scaling**0.5, k * scaling**0.5))
    return fq @ fk.transpose(-1, -2)


def gated_weights(mixer, q, k, x, padding):
    """`[B, H, T, T]`: sum over features of q_t k_s prod_{s < i <= t} decay_i, position by position."""
    batch, heads, length, size = q.shape
    gate = x @ mixer.gate_down.T @ mixer.gate_up.T + mixer.gate_bias
    decay = gate.sigmoid() ** (1 / 16)
    decay = decay.view(batch, length, -1, size).transpose(1, 2)
    decay = decay.repeat_interleave(heads // decay.shape[1], 1)
    q, k = q.softmax(-1), k.softmax(-1)
    weights = torch.zeros(batch, heads, length, length)
    for t in range(length):
        for s in range(t + 1):
            gone = decay[:, :, s + 1 : t + 1].prod(2)
            weights[:, :, t, s] = (q[:, :, t] * k[:, :, s] * gone).sum(-1) * padding[:, None, s]
    return weights


def some_tokens(batch, length, seed=0):
    return torch.randint(2, 258, (batch, length), generator=torch.Generator().manual_seed(seed))
