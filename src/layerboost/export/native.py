"""A hybrid as a stock transformers model: windows only, all alike, on a family whose own code knows windows.

What a stock class does with a configuration is found out by asking it: candidates are built and compared with the
hybrid, and the first that computes the same is taken.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerboost.errors import CheckpointError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import family_of, native_windows, stock_class
from layerboost.model.hybrid import Hybrid, has_soft_cap

# where a family has no windows of its own: one with the same tensors that has
_WINDOWED_TWIN = {
    "llama": ("mistral", "ministral"),
    "mistral": ("ministral",),
    "olmo2": ("olmo3",),
}
_OURS = ("model_type", "architectures", "layerboost", "transformers_version", "auto_map")


@torch.no_grad()
def native_model(hybrid: Hybrid) -> Any:
    """A stock model with the hybrid's weights that computes the same.

    Raises:
        CheckpointError: there is none; says why.
    """
    windows = _windows(hybrid)
    tried = []
    for config in _candidates(hybrid.config, windows):
        model = _filled(config, hybrid)
        if model is not None and _same(model, hybrid, windows):
            return model
        tried.append(config.model_type)
    families = f" (tried {', '.join(dict.fromkeys(tried))})" if tried else ""
    raise CheckpointError(
        f"no stock class computes this {family_of(hybrid.config)} hybrid{families}; export it as portable, or serve it "
        "with layerboost installed"
    )


def _windows(hybrid: Hybrid) -> list[int | None]:
    """What each layer sees; raises CheckpointError for what no stock class knows."""

    def refuse(index: int, plan: LayerPlan, why: str) -> CheckpointError:
        return CheckpointError(f"layer {index} is {plan.label}: {why}; export it as portable")

    found: list[int | None] = []
    for index, (plan, native) in enumerate(zip(hybrid.plan, native_windows(hybrid.config), strict=True)):
        if plan.mixer not in ("full_attention", "sliding_attention"):
            raise refuse(index, plan, "a stock class has only full and sliding attention")
        if plan.sink:
            raise refuse(index, plan, "stock classes of this family have no sinks")
        found.append(native if plan.window is None else plan.window)
    several = sorted({window for window in found if window is not None})
    if len(several) > 1:
        raise CheckpointError(
            f"the plan has several windows ({', '.join(map(str, several))}), a stock class has one; export it as "
            "portable"
        )
    return found


def _candidates(config: Any, windows: list[int | None]) -> Iterator[PreTrainedConfig]:
    family = family_of(config)
    window = next((w for w in windows if w is not None), None)
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    values = {key: value for key, value in config.to_dict().items() if key not in _OURS}
    if window is None:
        yield CONFIG_MAPPING[family](**values)
        return
    for name in (family, *_WINDOWED_TWIN.get(family, ())):
        if name not in CONFIG_MAPPING:
            continue
        changes: dict[str, Any] = {"sliding_window": window, "layer_types": types}
        if name == "olmo3" and name != family:  # has a rotary embedding for each type of layer
            changes["rope_parameters"] = dict.fromkeys(set(types), values["rope_parameters"])
        if name.startswith("qwen"):
            changes |= {"use_sliding_window": True, "max_window_layers": types.index("sliding_attention")}
        if None not in windows and "layer_types" not in values and name != "olmo3":
            changes.pop("layer_types")
        yield CONFIG_MAPPING[name](**(values | changes))


def _filled(config: PreTrainedConfig, hybrid: Hybrid) -> Any:
    """The stock model with the hybrid's tensors; None if they do not fit."""
    kind = stock_class(config.model_type)
    config._attn_implementation = "eager" if has_soft_cap(config) else "sdpa"
    with torch.device("meta"):
        try:
            model = kind(config)
        except (TypeError, ValueError, AttributeError):
            return None
    state = hybrid.state_dict()
    if model.state_dict().keys() != state.keys():
        return None
    model = model.to_empty(device=hybrid.device)
    for name, parameter in model.named_parameters():
        parameter.data = state[name].clone()
    theirs = dict(hybrid.named_buffers())
    for name, buffer in model.named_buffers():  # rotary frequencies: computed, not stored
        if name not in theirs:  # of each type of layer, where the hybrid has one for all
            name = name.replace("full_attention_", "").replace("sliding_attention_", "")
        if name not in theirs or theirs[name].shape != buffer.shape:
            return None
        buffer.copy_(theirs[name])
    model.tie_weights()
    return model.eval()


def _same(model: Any, hybrid: Hybrid, windows: list[int | None]) -> bool:
    widest = max((window for window in windows if window is not None), default=16)
    length = min(2 * widest + 5, hybrid.config.max_position_embeddings)
    if length <= widest:  # the window is never full
        return False
    tokens = torch.randint(0, hybrid.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    wanted, found = (m(tokens.to(m.device), use_cache=False).logits.float() for m in (hybrid, model))
    near = 1e-4 if hybrid.dtype == torch.float32 else 0.05
    return bool((wanted - found).abs().max() <= near * wanted.abs().max())
