"""Shapes of well-known models, for measurements that do not depend on what the weights are."""

from pathlib import Path
from typing import Any

from pydantic import Field
from transformers import PreTrainedConfig

from layerboost.artifacts import Plan, Record, load
from layerboost.errors import UsageError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import base_config_class

# from the models' published config.json
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        "model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "max_position_embeddings": 40_960, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "llama-3.2-1b": {
        "model_type": "llama", "num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
    "llama-3.1-8b": {
        "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256,
        "max_position_embeddings": 131_072, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    },
}  # fmt: skip


# what may be given in place of a shape's own, and what its label calls it
_CHANGES = {
    "num_hidden_layers": "layers", "vocab_size": "vocabulary", "num_attention_heads": "query heads",
    "num_key_value_heads": "key/value heads", "head_dim": "head size",
}  # fmt: skip


def shape_config(name: str, *, width: float = 1.0, **changes: int | None) -> PreTrainedConfig:
    """The configuration of a known shape, scaled.

    Args:
        width: factor on hidden size, intermediate size and both numbers of heads; the size of a head stays.
        changes: `num_hidden_layers`, `vocab_size`, `num_attention_heads`, `num_key_value_heads`, `head_dim` in place of
            what the shape and its width say; None leaves them.

    Raises:
        UsageError: no such shape, or a width that leaves no whole number.
    """
    if name not in SHAPES:
        raise UsageError(f"shape must be one of {', '.join(SHAPES)}, found {name!r}")
    given = {key: value for key, value in changes.items() if value is not None}
    values = dict(SHAPES[name])
    for key in {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"} - set(given):
        scaled = values[key] * width
        if scaled < 1 or scaled != int(scaled):
            raise UsageError(f"width {width:g} makes {key} {scaled:g} of {values[key]}; choose one that keeps it whole")
        values[key] = int(scaled)
    values |= given
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    if heads % groups:
        raise UsageError(f"{heads} query heads cannot share {groups} key/value heads; choose a multiple")
    family = values.pop("model_type")
    return base_config_class(family)(**values, architectures=None, dtype="bfloat16")


def shape_label(name: str, *, width: float = 1.0, **changes: int | None) -> str:
    """`qwen3-4b, width x 0.25, layers 8 of 36, random weights`: what has to stand beside every number."""
    parts = [name] if width == 1 else [name, f"width x {width:g}"]
    for key, word in _CHANGES.items():
        value, own = changes.get(key), SHAPES[name][key]
        if value is not None and value != own:
            parts.append(f"{word} {value:,} of {own:,}")
    return ", ".join([*parts, "random weights"])


def mixed_plan(shares: str, layers: int, window: int) -> list[LayerPlan]:
    """A plan by shares of full, sliding and no attention in percent, such as `25/50/25`, spread evenly over the layers.

    Raises:
        UsageError: not three numbers that add up to 100.
    """
    parts = shares.split("/")
    try:
        percent = [float(part) for part in parts]
    except ValueError:
        percent = []
    if len(percent) != 3 or not abs(sum(percent) - 100) <= 1e-6 or min(percent) < 0:
        raise UsageError(f"plan {shares!r} must be three percentages that add up to 100, such as 25/50/25, or a file")
    mixers = (LayerPlan("full_attention"), LayerPlan("sliding_attention", window=window), LayerPlan("no_attention"))
    wanted = [share / 100 for share in percent]
    given = [0, 0, 0]
    chosen = []
    for index in range(1, layers + 1):  # each next layer goes to the mixer that is furthest behind its share
        behind = max(range(3), key=lambda n: wanted[n] * index - given[n])
        given[behind] += 1
        chosen.append(mixers[behind])
    return chosen


def named_plan(plan: str, layers: int, window: int | None = None) -> list[LayerPlan]:
    """A plan file's layers, or a plan by shares.

    Args:
        window: of the sliding share; None is 64.

    Raises:
        PlanError: the file is not a plan.
        UsageError: neither a file nor shares, or a window beside a file, which has its own.
    """
    if not Path(plan).is_file():
        return mixed_plan(plan, layers, 64 if window is None else window)
    if window is not None:
        raise UsageError(f"window {window} is for shares such as 25/50/25; {plan} has its own, so leave it out")
    return load(Plan, Path(plan)).layers


class Shape(Record):
    """A well-known shape with random weights and a plan for it, in place of a hybrid.

    Attributes:
        plan: shares of full, sliding and no attention in percent, or a plan file.
        window: of the sliding share; None is 64.
    """

    name: str
    layers: int | None = Field(None, ge=1)
    width: float = Field(1.0, gt=0)
    vocabulary: int | None = Field(None, ge=2)
    heads: int | None = Field(None, ge=1)
    kv_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=2, multiple_of=2)
    plan: str = "25/50/25"
    window: int | None = Field(None, ge=1)

    def _sizes(self) -> dict[str, Any]:
        return {
            "width": self.width, "num_hidden_layers": self.layers, "vocab_size": self.vocabulary,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "head_dim": self.head_dim,
        }  # fmt: skip

    @property
    def label(self) -> str:
        return shape_label(self.name, **self._sizes())

    def config(self) -> PreTrainedConfig:
        return shape_config(self.name, **self._sizes())

    def layer_plan(self, layers: int) -> list[LayerPlan]:
        return named_plan(self.plan, layers, self.window)
