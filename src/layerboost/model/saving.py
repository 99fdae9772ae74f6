"""How a hybrid is written: whole, with its tokenizer, and read back before it gets its name."""

from pathlib import Path
from typing import Any

import jinja2
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from layerboost.artifacts import CARD, check_space, publish_folder
from layerboost.errors import CheckpointError, EnvironmentTrouble, TrainingError
from layerboost.layer_plan import LayerPlan
from layerboost.model.hybrid import Hybrid
from layerboost.model.loading import copy_beside_weights, load_model

_CARD = jinja2.Template(
    """---
library_name: transformers
tags: [layerboost, hybrid-attention]
---
# {{ name }}

A hybrid made by [LayerBoost](https://arxiv.org/abs/2604.22050) from `{{ base }}`: {{ what }}.

```python
import layerboost
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

| layer | mixer | why |
|---|---|---|
{%- for plan in layers %}
| {{ loop.index0 }} | {{ plan.label }} | {{ plan.reason or "" }} |
{%- endfor %}
"""
)


def save_hybrid(
    model: Hybrid,
    out: Path,
    *,
    original: Path,
    inputs: dict[str, str],
    what: str,
    extra_files: dict[str, str] | None = None,
) -> None:
    """Publish a hybrid checkpoint.

    Args:
        original: folder of the base model, whose tokenizer goes along.
        what: half a sentence for the model card.
        extra_files: text files that go into the folder, by name.

    Raises:
        TrainingError: a weight is not finite; nothing is published.
        CheckpointError: what was written does not read back to the same logits or tokens; nothing is published.
        EnvironmentTrouble: not enough disk.
    """
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise TrainingError(f"tensor {name} holds values that are not finite; {out} was not written")
    check_space(out, sum(p.numel() * p.element_size() for p in model.parameters()))
    with publish_folder(out, inputs) as folder:
        generation, model.generation_config = model.generation_config, GenerationConfig()
        try:
            # the original's is copied as it is; many hold settings that transformers refuses to write
            save_weights(model, folder, out)
        finally:
            model.generation_config = generation
        copy_beside_weights(original, folder)
        for name, text in (extra_files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        base = model.config.layerboost["provenance"].get("base", {}).get("name", "a base model")
        (folder / CARD).write_text(_card(out.name, base, what, model.plan), encoding="utf-8")
        _read_back(model, folder)


def save_weights(model: Any, folder: Path, out: Path) -> None:
    """Raises EnvironmentTrouble, which speaks of `out`, where the disk does not take them."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as trouble:
        raise EnvironmentTrouble(
            f"{out} cannot be written: {trouble}; free some space and run the same command again"
        ) from None


def _card(name: str, base: str, what: str, layers: list[LayerPlan]) -> str:
    return _CARD.render(name=name, base=base, what=what, layers=layers)


@torch.no_grad()
def _read_back(model: Hybrid, folder: Path) -> None:
    """Raises CheckpointError unless the folder holds the model's tensors to the bit, and computes its logits."""
    length = min(32, model.config.max_position_embeddings)
    tokens = torch.arange(length)[None] * 7 % model.config.vocab_size
    again = load_model(folder)
    stored, held = again.state_dict(), model.state_dict()
    same = stored.keys() == held.keys() and all(torch.equal(stored[name], held[name].cpu()) for name in held)
    wanted, found = model(tokens.to(model.device)).logits.float().cpu(), again(tokens).logits.float()
    # batched products of few rows, as in linear attention, round by where memory lies
    exact = all(plan.mixer != "linear_attention" for plan in model.plan)
    near = 0.0 if exact else 0.02 * wanted.abs().max().item()
    if not (same and torch.allclose(wanted, found, rtol=0, atol=near, equal_nan=True)):
        raise CheckpointError(f"{folder}: the checkpoint does not read back to the same logits; nothing was published")
