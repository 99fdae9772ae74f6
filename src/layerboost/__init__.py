"""LayerBoost: a pretrained decoder LLM in, a faster hybrid out.

`import layerboost` loads no torch. It teaches transformers to open hybrid checkpoints as soon as transformers is there.
"""

import importlib
from typing import Any

from layerboost import _registration

__version__ = "0.1.0"

_VERBS = (
    "analyze",
    "plan",
    "convert",
    "heal",
    "evaluate",
    "bench",
    "serve",
    "export",
    "verify",
    "report",
    "pipeline",
    "inspect",
    "predict",
    "compare",
    "stability",
)
_PUBLIC = {
    "Sensitivity": "layerboost.artifacts",
    "Plan": "layerboost.artifacts",
    "LayerPlan": "layerboost.layer_plan",
    "LayerBoostError": "layerboost.errors",
}
__all__ = ["__version__", *_PUBLIC, *_VERBS]


def __getattr__(name: str) -> Any:
    """Verbs are modules, each with a `run`; they load when first asked for."""
    if name in _VERBS:
        return importlib.import_module(f"layerboost.{name}")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'layerboost' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


_registration.install()
