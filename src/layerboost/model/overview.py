"""Which families can become hybrids, and how that is known."""

from dataclasses import dataclass

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.errors import CheckpointError
from layerboost.model.config import base_config_class, stock_class
from layerboost.model.families import VERIFIED, anatomy_of

_CONTRACT = "contract tests: all mixers at all places against the stock model with hooks, float32"
_PROVEN = "no tests here; each model is tried on its own weights when it is loaded, and refused if it differs"


@dataclass(frozen=True)
class Entry:
    """Attributes:
    supported: None where only an attempt tells.
    """

    family: str
    model_class: str
    supported: bool | None
    how: str


def overview(everything: bool) -> list[Entry]:
    """The verified families; if `everything`, then all causal language models of the installed transformers."""
    rest = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(VERIFIED)) if everything else []
    return [_entry(family) for family in (*VERIFIED, *rest)]


def _entry(family: str) -> Entry:
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family, ""))
    if family in VERIFIED:
        return Entry(family, name, True, _CONTRACT)
    try:
        config = base_config_class(family)(num_hidden_layers=2)
        with torch.device("meta"):
            base = stock_class(family)(config).base_model
        anatomy_of(base)
    except CheckpointError as trouble:
        return Entry(family, name, False, str(trouble).partition("converted: ")[2] or str(trouble))
    except Exception as trouble:  # not every family builds from its default configuration
        first = (str(trouble).splitlines() or [type(trouble).__name__])[0]
        return Entry(family, name, None, f"try it: its default configuration does not build here ({first[:80]})")
    return Entry(family, name, True, _PROVEN)
