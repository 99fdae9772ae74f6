"""Lets transformers' auto classes open hybrids after `import layerboost`, without loading transformers or torch itself.

Registering needs transformers' modeling code complete, and that imports the auto module half-way; so the auto module is
only marked when it loads, and a family's hybrids are registered when the configuration of one is first asked for.
"""

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto.configuration_auto"


class _MarkAfterLoading(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the auto module in the usual way, once, and marks it after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        self.loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_on_use(module.AutoConfig)


def _register_on_use(auto_config: Any) -> None:
    original = auto_config.__dict__["from_pretrained"].__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        family = _family_of_hybrid(pretrained_model_name_or_path, kwargs)
        if family is not None:
            importlib.import_module("layerboost.model.hybrid").register(family)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


def _family_of_hybrid(source: Any, kwargs: dict[str, Any]) -> str | None:
    """The family, if this is the checkpoint of a hybrid; troubles are left to transformers to report."""
    try:
        raw, _ = importlib.import_module("transformers").PreTrainedConfig.get_config_dict(source, **kwargs)
    except Exception:
        return None
    model_type = str(raw.get("model_type", ""))
    return model_type.removeprefix("layerboost_") if model_type.startswith("layerboost_") else None


def install() -> None:
    if _AUTO in sys.modules:
        _register_on_use(sys.modules[_AUTO].AutoConfig)
    else:
        sys.meta_path.insert(0, _MarkAfterLoading())
