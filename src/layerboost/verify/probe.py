"""What a checkpoint computes, measured on plain transformers: imports nothing of LayerBoost, and runs as a script too.

    python probe.py FOLDER PROMPTS.safetensors OUT.safetensors DTYPE --trust-remote-code

As a script it opens the folder as a user without LayerBoost would; importing layerboost is an error there.
"""

import sys
from typing import Any

import torch
from torch import Tensor

KEPT = 32  # positions whose logits are compared, the last of each prompt


@torch.no_grad()
def measure(model: Any, prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits `[K, V]` float32 of the last positions of each `[1, T]` prompt, in several ways, and cache bytes.

    Returns:
        Per prompt: `NAME.whole`, `NAME.cached` (one token at a time after half), `NAME.chunked` (in uneven pieces),
        `NAME.padded` (beside padding on the left), and `NAME.kv` bytes after the last token.
    """
    from transformers import DynamicCache

    found = {}
    for name, tokens in prompts.items():
        tokens = tokens.to(model.device)
        length = tokens.shape[1]
        kept = min(KEPT, length)
        found[f"{name}.whole"] = model(tokens, use_cache=False).logits[0, -kept:]
        # one token at a time only where it counts: the positions that are compared
        for way, sizes in (("cached", [length - kept, *[1] * kept]), ("chunked", _pieces(length))):
            cache, parts = DynamicCache(config=model.config), []
            for part in tokens.split([size for size in sizes if size], 1):
                parts.append(model(part, past_key_values=cache, use_cache=True).logits[0, -kept:])
            found[f"{name}.{way}"] = torch.cat(parts)[-kept:]
            if way == "cached":
                found[f"{name}.kv"] = torch.tensor(_cache_bytes(cache))
        padding = min(7, length)
        padded = torch.cat([tokens[:, :padding], tokens], 1)
        mask = torch.ones_like(padded)
        mask[:, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = model(padded, attention_mask=mask, position_ids=positions, use_cache=False)
        found[f"{name}.padded"] = out.logits[0, -kept:]
    return {key: (value.float() if value.is_floating_point() else value).cpu() for key, value in found.items()}


def _pieces(length: int) -> list[int]:
    first, second = length // 3, length // 4
    return [first, second, length - first - second]


def _cache_bytes(cache: Any) -> int:
    """Bytes that a cache really holds on to."""
    storages = {}
    for layer in cache.layers:
        for tensor in (getattr(layer, name, None) for name in ("keys", "values", "state")):
            if isinstance(tensor, Tensor):
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


class _Absent:
    """Makes importing layerboost fail, as it does where it is not installed."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.partition(".")[0] == "layerboost":
            raise ModuleNotFoundError(f"No module named {name!r}")


def main() -> None:
    folder, prompts, out, dtype = sys.argv[1:5]
    sys.meta_path.insert(0, _Absent())
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": "--trust-remote-code" in sys.argv}
    config = AutoConfig.from_pretrained(folder, **options)
    if getattr(config, "attn_logit_softcapping", None):  # which transformers' default leaves out
        options["attn_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    assert not any(name.partition(".")[0] == "layerboost" for name in sys.modules)
    save_file({key: value.contiguous() for key, value in measure(model, load_file(prompts)).items()}, out)


if __name__ == "__main__":
    main()
