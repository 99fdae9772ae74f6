"""Where an artifact comes from: versions, machine and settings."""

import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from layerboost.artifacts import ModelRecord, Record

_PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "layerboost": _version("layerboost")}
    return found | {package: _version(package) for package in _PACKAGES}


def provenance(config: Record | None = None, **more: Any) -> dict[str, Any]:
    """Everything informative that belongs beside an artifact; nothing in it decides anything."""
    record: dict[str, Any] = {"versions": versions(), "machine": f"{platform.system()} {platform.machine()}"}
    if config is not None:
        record["settings"] = config.model_dump(mode="json")
    return record | more


def base_provenance(model: ModelRecord) -> dict[str, Any]:
    """What a hybrid says of where it comes from; the same for the same model and versions."""
    return {"base": {"name": model.name, "digest": model.digest}, "versions": versions()}


def command() -> str:
    """The command line that this process was started with."""
    return shlex.join(["layerboost", *sys.argv[1:]])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
