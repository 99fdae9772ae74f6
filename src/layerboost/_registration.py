"""Lets transformers' auto classes open hybrids after `import layerboost`, without loading transformers or torch itself.

Registering needs transformers' modeling code complete, and that imports the auto module half-way; so the auto module is
only marked when it loads, and the hybrids are registered when a configuration is first asked for.
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
        _register_on_first_use(module.AutoConfig)


def _register_on_first_use(auto_config: Any) -> None:
    original = auto_config.__dict__["from_pretrained"]

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        importlib.import_module("layerboost.model.hybrid")
        auto_config.from_pretrained = original
        return original.__func__(cls, *args, **kwargs)

    auto_config.from_pretrained = classmethod(from_pretrained)


def install() -> None:
    if _AUTO in sys.modules:
        _register_on_first_use(sys.modules[_AUTO].AutoConfig)
    else:
        sys.meta_path.insert(0, _MarkAfterLoading())
