"""What one layer of a hybrid gets. Standard library alone: this file also travels with portable checkpoints."""

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from layerboost.errors import PlanError

MixerName = Literal["full_attention", "sliding_attention", "linear_attention", "no_attention"]
MIXERS: tuple[str, ...] = get_args(MixerName)

# what a linear_attention variant may be made of: feature maps, the first is the default, and whether it has a window
VARIANTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "lolcats": (("hedgehog", "elu"), True),
    "linear": (("elu",), False),
    "performer": (("favor",), False),
    "gla": (("softmax",), False),
}
# features per number of a head, by feature map: what the state of linear_attention is as large as
FEATURES = {"hedgehog": 2, "elu": 1, "favor": 2, "softmax": 1}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets.

    Attributes:
        mixer: `full_attention` (as it was), `sliding_attention`, `linear_attention` or `no_attention`.
        window: tokens a query sees by softmax, itself included; for `sliding_attention`, and `linear_attention` with
            variant `lolcats`.
        sink: whether a `sliding_attention` has a learned logit per head that takes attention and gives nothing.
        variant: of `linear_attention`: `lolcats`, `linear`, `performer` or `gla`.
        feature_map: of `linear_attention`; each variant has a default.
        reason: why, in a sentence, from the planner.

    Raises:
        PlanError: a key is missing, or has no meaning for this mixer.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    mixer: MixerName
    window: int | None = None
    sink: bool = False
    variant: str | None = None
    feature_map: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise PlanError(
                f"mixer must be one of {', '.join(MIXERS)}, found {self.mixer!r}{_meant(self.mixer, MIXERS)}"
            )
        if not isinstance(self.sink, bool):
            raise PlanError(f"sink must be true or false, found {self.sink!r}")
        if self.reason is not None and not isinstance(self.reason, str):
            raise PlanError(f"reason must be text, found {self.reason!r}")
        if self.mixer == "linear_attention":
            self._check_variant()
        windowed_variant = self.mixer == "linear_attention" and VARIANTS[self.variant or ""][1]
        needs_window = self.mixer == "sliding_attention" or windowed_variant
        self._check_window(needs_window)
        for key, belongs_to in (("sink", "sliding_attention"), ("variant", "linear_attention"),
                                ("feature_map", "linear_attention")):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value is not False and self.mixer != belongs_to:
                raise PlanError(f"{key} {value!r} has no meaning for {self.mixer}; leave it out")

    def _check_variant(self) -> None:
        if not isinstance(self.variant, str) or self.variant not in VARIANTS:
            raise PlanError(
                f"variant must be one of {', '.join(VARIANTS)} for linear_attention, found {self.variant!r}"
                f"{_meant(self.variant, VARIANTS)}"
            )
        maps, _ = VARIANTS[self.variant]
        if self.feature_map is None:
            object.__setattr__(self, "feature_map", maps[0])
        if self.feature_map not in maps:
            raise PlanError(
                f"feature_map must be one of {', '.join(maps)} for variant {self.variant}, found {self.feature_map!r}"
            )

    def _check_window(self, needed: bool) -> None:
        what = self.mixer if self.variant is None else f"{self.mixer} of variant {self.variant}"
        if needed and self.window is None:
            raise PlanError(f"window is missing; {what} needs one, in tokens")
        if not needed and self.window is not None:
            raise PlanError(f"window {self.window} has no meaning for {what}; leave it out")
        if needed and (not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1):
            raise PlanError(f"window must be a whole number of at least 1, in tokens, found {self.window!r}")

    @property
    def label(self) -> str:
        """`sliding_attention 64 sink`."""
        variant = None if self.variant is None else f"{self.variant}/{self.feature_map}"
        parts = [self.mixer, variant, None if self.window is None else str(self.window), "sink" if self.sink else None]
        return " ".join(part for part in parts if part)

    def entry(self) -> dict[str, Any]:
        """The plan file's entry, without what is not set."""
        return {
            key: value for key, value in dataclasses.asdict(self).items() if value is not None and value is not False
        }

    def alike(self, other: "LayerPlan") -> bool:
        """Whether both give a layer the same mixer, whatever their reasons."""
        return self._what() == other._what()

    def narrows(self, native: int | None) -> bool:
        """Whether a layer that sees `native` tokens, or everything, would see less; linear attention looks back all the
        way."""
        if self.mixer == "linear_attention":
            return native is None
        window = 0 if self.mixer == "no_attention" else self.window
        return window is not None and (native is None or window < native)

    def _what(self) -> tuple[Any, ...]:
        return self.mixer, self.window, self.sink, self.variant, self.feature_map


_LETTERS = {"full_attention": "F", "sliding_attention": "W", "no_attention": "N", "linear_attention": ""}


def short(label: str) -> str:
    """`F`, `W64`, `N`, `lolcats/hedgehog16`."""
    name, *rest = label.split()
    return _LETTERS[name] + "".join(rest)


def _meant(found: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(found), list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


KEEP = LayerPlan("full_attention")


def full_plan(num_layers: int) -> list[LayerPlan]:
    return [KEEP] * num_layers


def parse_layers(raw: Any, where: str) -> list[LayerPlan]:
    """A plan's entries, checked.

    Raises:
        PlanError: naming `where`, the layer and the key.
    """
    if not isinstance(raw, list):
        raise PlanError(f"{where}: layers must be a list with one entry per layer, found {type(raw).__name__}")
    return [_parse(entry, f"{where}: layer {index}") for index, entry in enumerate(raw)]


def _parse(entry: Any, where: str) -> LayerPlan:
    known = [field.name for field in dataclasses.fields(LayerPlan)]
    if not isinstance(entry, dict):
        raise PlanError(f"{where}: must be an object with the key mixer, found {type(entry).__name__}")
    for key in entry:
        if key not in known:
            raise PlanError(f"{where}: unknown key {key}{_meant(key, known) or '; known keys: ' + ', '.join(known)}")
    if "mixer" not in entry:
        raise PlanError(f"{where}: key mixer is missing")
    try:
        return LayerPlan(**entry)
    except PlanError as trouble:
        raise PlanError(f"{where}: {trouble}") from None
