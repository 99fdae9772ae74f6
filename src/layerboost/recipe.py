"""recipe: what a run is told, from a YAML file and `key=value` overrides. An unknown key is an error."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field

from layerboost.analyze import Config as AnalyzeConfig
from layerboost.artifacts import Record, validate
from layerboost.bench import Config as BenchConfig
from layerboost.errors import UsageError
from layerboost.evaluate import Config as EvaluateConfig
from layerboost.heal import Config as HealConfig
from layerboost.plan import Config as PlanConfig

AnyRecord = TypeVar("AnyRecord", bound=Record)
_SHARED = ("text", "seed", "device")
_VERBS = ("analyze", "plan", "heal", "evaluate", "bench")


class Recipe(Record):
    """One section per verb; `text`, `seed` and `device` hold for every verb that does not say otherwise."""

    analyze: AnalyzeConfig = AnalyzeConfig()
    plan: PlanConfig = PlanConfig()
    heal: HealConfig = HealConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    bench: BenchConfig = BenchConfig()
    text: Path | None = None
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def section(self, kind: type[AnyRecord], verb: str) -> AnyRecord:
        """A verb's settings with the shared ones filled in."""
        own = getattr(self, verb)
        raw = own.model_dump(exclude_unset=True)
        for key in _SHARED:
            if key in kind.model_fields and key in self.model_fields_set:
                raw.setdefault(key, getattr(self, key))
        return validate(kind, raw, f"recipe: {verb}", UsageError)

    def resolved(self) -> dict[str, Any]:
        """Every verb's settings in full, as plain values that read back to the same; what all share stands on top."""
        shared = self.model_dump(mode="json", include=set(_SHARED))
        found: dict[str, Any] = dict(shared)
        for verb in _VERBS:
            own = self.section(type(getattr(self, verb)), verb).model_dump(mode="json")
            found[verb] = {key: value for key, value in own.items() if key not in shared or value != shared[key]}
        return found


def shipped() -> list[str]:
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load_recipe(source: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file, or the name of a shipped one; None is the default.

    Args:
        overrides: `key=value` with dotted keys, such as `heal.tokens=200k`; values are YAML.

    Raises:
        UsageError: no such recipe, not YAML, or keys or values that are not allowed.
    """
    name = str(source or "default")
    if name in shipped():
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as trouble:
            raise UsageError(
                f"recipe {name} cannot be read: {trouble}; name a YAML file, or one of {', '.join(shipped())}"
            ) from None
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as trouble:
        raise UsageError(f"recipe {name} is not YAML: {' '.join(str(trouble).split())}") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UsageError(f"recipe {name} must hold keys and values, found {type(raw).__name__}")
    raw = {key: {} if value is None and key in _VERBS else value for key, value in raw.items()}
    return configured(Recipe, overrides, raw, where=f"recipe {name}")


def configured(
    kind: type[AnyRecord],
    overrides: Sequence[str],
    raw: dict[str, Any] | None = None,
    where: str = "settings",
    flags: dict[str, Any] | None = None,
) -> AnyRecord:
    """Settings from plain values and `key=value` overrides, which win, and from flags, which say it once."""
    raw = (raw or {}) | (flags or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"{override!r} is not an override; write key=value, such as heal.tokens=200k")
        if key in (flags or {}):
            raise UsageError(f"{override!r}: a flag says {key} already; give it once")
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):
            raise UsageError(f"{override!r}: the value is not YAML; quote it") from None
        _put(raw, key.split("."), parsed, override)
    return validate(kind, raw, where, UsageError)


def _put(raw: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for part in path[:-1]:
        inner = raw.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{override!r}: {part} is a value, it has no keys inside")
        raw = inner
    raw[path[-1]] = value


def _folder() -> Any:
    return resources.files("layerboost") / "recipes"
