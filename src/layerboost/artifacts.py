"""Files that verbs hand to one another: what is in them, and how they are written whole or not at all."""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import statistics
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import filelock
import pydantic
from pydantic import AfterValidator, BeforeValidator, Field

from layerboost import __version__
from layerboost.errors import CheckpointError, EnvironmentTrouble, LayerBoostError, PlanError, UsageError
from layerboost.layer_plan import FEATURES, LayerPlan, MixerName, parse_layers


class Record(pydantic.BaseModel):
    """Unknown keys are errors, and so are numbers that are not finite."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True, validate_by_name=True
    )


# a comma parts thousands; one that parts decimals would be off by as much
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d_.]+)(?:e[-+]?\d+)?"


def _with_unit(what: str, examples: str, units: dict[str, float], whole: bool = False) -> BeforeValidator:
    """Numbers with a unit, as people write them; what is a number already stays."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found: Any = re.fullmatch(rf"({_NUMBER}) *([a-z%]*)", value.strip().lower())
        try:
            number = float(found[1].replace(",", "")) * units[found[2]]
            return round(number) if whole else round(number, 12)
        except (TypeError, KeyError, ValueError, OverflowError):  # no match, no such unit, no number, or no finite one
            raise ValueError(f"{value!r} is not {what}; write {examples}") from None

    return BeforeValidator(read)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        hint = f"; write {value:g}% for {value:g} of a hundred" if value in range(2, 101) else ""
        raise ValueError(f"a share is between 0 and 1, or 0% and 100%, found {value:g}{hint}")
    return value


_THOUSANDS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
_BYTES = {"": 1, "b": 1} | {
    f"{prefix}{unit}": base**power
    for power, prefix in enumerate("kmgt", 1) for unit, base in (("", 1e3), ("b", 1e3), ("ib", 1024))
}  # fmt: skip
Tokens = Annotated[int, _with_unit("a number of tokens", "200000, 200k or 10M", _THOUSANDS, whole=True), Field(ge=1)]
Share = Annotated[float, _with_unit("a share", "0.6 or 60%", {"": 1, "%": 0.01}), AfterValidator(_share)]
Times = Annotated[float, _with_unit("a ratio", "1.5 or 1.5x", {"": 1, "x": 1}), Field(gt=0)]
Bytes = Annotated[float, _with_unit("a number of bytes", "20000, 20kB or 8GiB", _BYTES), Field(ge=0)]
WholeBytes = Annotated[int, _with_unit("a number of bytes", "20000, 20kB or 8GiB", _BYTES, whole=True), Field(ge=1)]


class Artifact(Record):
    """A record with a file of its own.

    Attributes:
        inputs: digest of everything the file was made from; a pipeline stage is current while these are.
        provenance: versions, settings and times; informative.
    """

    schema_version: Literal[1] = Field(1, alias="schema")
    inputs: dict[str, str] = {}
    provenance: dict[str, Any] = {}


class KVShape(Record):
    num_key_value_heads: int
    head_dim: int
    bytes_per_value: int

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_key_value_heads * self.head_dim * self.bytes_per_value

    def state_bytes(self, plan: LayerPlan) -> int:
        """Of linear attention: per key/value head, features times head size and a normaliser, in float32."""
        features = FEATURES[plan.feature_map or ""] * self.head_dim
        return self.num_key_value_heads * features * (self.head_dim + 1) * 4


class ModelRecord(Record):
    """Which model an artifact speaks of.

    Attributes:
        digest: sha256 over the configuration and the weights.
        kv_shape: per layer and token, keys and values alike: heads, head size, bytes per number.
        native_windows: per layer, the window of the original model; None is everything.
        context: most tokens the model was made for.
    """

    name: str
    digest: str
    num_layers: int
    kv_shape: KVShape
    native_windows: list[int | None]
    context: int

    @property
    def usual_context(self) -> int:
        """Tokens that a cache is counted for where nothing else is said."""
        return min(self.context, 4_096)

    def kv_bytes(self, layers: list[LayerPlan], context: int) -> int:
        """Cache bytes of one sequence of `context` tokens under a plan; states of linear attention are counted in.

        A window of W holds at most W - 1 tokens; linear attention a float32 state, and the W tokens of its window.
        """
        total = 0
        for plan, native in zip(layers, self.native_windows, strict=True):
            if plan.mixer == "linear_attention":
                total += self.kv_shape.state_bytes(plan) + (plan.window or 0) * self.kv_shape.bytes_per_token
            elif plan.mixer != "no_attention":
                window = native if plan.window is None else plan.window
                held = context if window is None else min(context, window - 1)
                total += held * self.kv_shape.bytes_per_token
        return total

    def receptive_field(self, layers: list[LayerPlan]) -> int | None:
        """Tokens the last position sees through all layers together, itself included; None is everything."""
        reach = 1
        for plan, native in zip(layers, self.native_windows, strict=True):
            if plan.mixer == "no_attention":
                continue
            window = native if plan.mixer == "full_attention" else plan.window
            if window is None or plan.mixer == "linear_attention":
                return None
            reach += window - 1
        return reach


class Damage(Record):
    """How much worse one metric gets: mean over sequences, 95 % bootstrap interval, and every sequence."""

    mean: float
    low: float
    high: float
    per_sequence: list[float] = []


class Candidate(Record):
    """A mixer that was tried in a layer, and the damage it does, by metric."""

    mixer: MixerName
    window: int | None = None
    sink: bool = False
    variant: str | None = None
    feature_map: str | None = None
    damage: dict[str, Damage]

    @property
    def plan(self) -> LayerPlan:
        return LayerPlan(self.mixer, self.window, self.sink, self.variant, self.feature_map)

    @classmethod
    def of(cls, plan: LayerPlan, damage: dict[str, Damage]) -> "Candidate":
        return cls(
            mixer=plan.mixer, window=plan.window, sink=plan.sink, variant=plan.variant, feature_map=plan.feature_map,
            damage=damage,
        )  # fmt: skip


class Cost(Record):
    """Of measuring: passes of all its tokens through the whole model, backward ones counted twice, and seconds."""

    tokens: int
    forwards: float
    seconds: float


class Resolution(Record):
    """What the error bars say.

    Attributes:
        confidence: of every statement here.
        weights: how metrics add up to the loss that layers are ranked by.
        ranking: per mixer's label, layers with the largest loss first; those in one group cannot be told apart from
            their neighbours in it.
        kv_reduction, stability: share of resampled data on which the plan at this budget comes out the same.
        stopped: why no more data was looked at, where that was asked for: `stable`, `token cap` or
            `no more text`.
    """

    confidence: float
    weights: dict[str, float]
    ranking: dict[str, list[list[int]]]
    kv_reduction: float | None = None
    stability: float | None = None
    stopped: str | None = None


class Sensitivity(Artifact):
    """`sensitivity.json`.

    Attributes:
        layers: per layer, what was tried there instead of its attention.
        baseline: per metric, the untouched model's own value.
        costs: what finding the metrics took, by their group.
        resolution: which layers cannot be told apart, and whether the plan at a budget is stable.
    """

    model: ModelRecord
    layers: list[list[Candidate]]
    baseline: dict[str, Damage] = {}
    costs: dict[str, Cost] = {}
    resolution: Resolution | None = None


class FrontPoint(Record):
    """One of the best plans: no other that was looked at has less loss and less cache.

    Attributes:
        loss: nats; measured on the whole plan, or damages added up.
        kv_share: of the base model's cache.
        layers: every layer's mixer by its label.
        chosen: whether it is the plan beside it.
    """

    loss: float
    measured: bool
    kv_share: float
    layers: list[str]
    chosen: bool = False


class Plan(Artifact):
    """`plan.json`; `layers` is all that a person has to write.

    Attributes:
        predicted: what the planner expects: loss, KV share, receptive field.
        measured: what the planner measured on the whole plan, and what finding it cost.
        front: what other budgets would give.
    """

    layers: list[LayerPlan]
    model: ModelRecord | None = None
    planner: dict[str, Any] = {}
    predicted: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    front: list[FrontPoint] = []


class CurvePoint(Record):
    """One look at the healing, at the validation split, after some tokens.

    Attributes:
        loss: mean training loss since the look before.
        kl, nll: on text, in nats per token.
        recall: share of right answers, mean over probes.
        recall_kl: on the answers, in nats per token, mean over probes.
    """

    step: int
    tokens: int
    loss: float | None = None
    kl: float
    nll: float
    recall: float
    recall_kl: float

    @property
    def distance(self) -> float:
        """What healing brings down, and looks are compared by."""
        return self.kl + self.recall_kl


class Healing(Artifact):
    """`healing.json`, inside the healed checkpoint.

    Attributes:
        tokens: that were trained on; what is published may be of an earlier look.
        curve: looks, the first before any training.
        published: step of the look whose weights these are: the last that is no worse than any other, but for chance.
        base_nll, base_recall: of the original on the validation split.
        skipped: steps whose loss or gradient was not finite.
        alarms: what was noticed on the way, in sentences.
    """

    tokens: int
    steps: int
    trained_parameters: int
    curve: list[CurvePoint]
    published: int
    base_nll: float
    base_recall: float
    skipped: int = 0
    alarms: list[str] = []

    @property
    def best(self) -> CurvePoint:
        """The look whose weights are published."""
        return next(point for point in self.curve if point.step == self.published)

    def closed(self, point: CurvePoint) -> dict[str, float | None]:
        """Share of the gap to the original that healing closed: of the KL, the NLL and recall; None without a gap."""
        first = self.curve[0]
        gaps = {
            "kl": (first.kl, point.kl),
            "nll": (first.nll - self.base_nll, point.nll - self.base_nll),
            "recall": (self.base_recall - first.recall, self.base_recall - point.recall),
        }
        return {name: None if gap <= 0 else 1 - left / gap for name, (gap, left) in gaps.items()}


class Estimate(Record):
    """A mean over sequences with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def show(self, percent: bool = False) -> str:
        """`0.123 (0.118 to 0.129)`."""
        factor, digits, unit = (100, 1, " %") if percent else (1, 3, "")
        mean, low, high = (f"{factor * value:.{digits}f}" for value in (self.mean, self.low, self.high))
        return f"{mean}{unit} ({low} to {high})"


class Quality(Record):
    """One model on the held-out data. KL is KL(base || this model), in nats per token, like the NLL."""

    nll: Estimate
    kl: Estimate
    perplexity: float
    recall: dict[str, Estimate]


class Completion(Record):
    """A greedy completion of the same prompt by both models."""

    prompt: str
    base: str
    hybrid: str
    same_tokens: int
    tokens: int


class TaskScore(Record):
    """One metric of an lm-eval task, as lm-eval computes it.

    Attributes:
        value, stderr: None where lm-eval gives none, or one that is not finite.
        higher_is_better: None where the task does not say.
        documents: that were asked.
    """

    value: float | None
    stderr: float | None = None
    higher_is_better: bool | None = None
    documents: int

    def show(self) -> str:
        """`0.412 ± 0.014`."""
        if self.value is None:
            return "no number"
        return f"{self.value:.3f}" + ("" if self.stderr is None else f" ± {self.stderr:.3f}")


class TaskRow(Record):
    """A metric of a task, side by side: every model's score, and what the healed one has more than the base."""

    name: str
    scores: list[str]
    difference: str


class Evaluation(Artifact):
    """`evaluation.json`: base, converted (no healing) and healed.

    Attributes:
        tasks: per model, lm-eval task and metric.
    """

    models: dict[str, Quality]
    tasks: dict[str, dict[str, dict[str, TaskScore]]] = {}
    completions: list[Completion] = []

    def task_rows(self) -> list[TaskRow]:
        """What of the tasks is shown; arrows say which way is better."""
        return [
            _task_row(task, metric, [found[task].get(metric) for found in self.tasks.values()])
            for task, metrics in self.tasks.get("base", {}).items()
            for metric in metrics
        ]


def _task_row(task: str, metric: str, scores: list[TaskScore | None]) -> TaskRow:
    base, *_, healed = scores
    arrow = {True: " ↑", False: " ↓", None: ""}[base.higher_is_better if base else None]
    values = [None if score is None else score.value for score in (base, healed)]
    known = [value for value in values if value is not None]
    return TaskRow(
        name=f"{task}: {metric}{arrow}",
        scores=["missing" if score is None else score.show() for score in scores],
        difference=f"{known[1] - known[0]:+.3f}" if len(known) == 2 else "",
    )


class Ratio(Record):
    """Hybrid over base, per repeat: smallest, median, largest."""

    min: float
    median: float
    max: float

    @classmethod
    def of_times(cls, base: list[float], hybrid: list[float]) -> "Ratio":
        """How much faster: base time over hybrid time, repeat by repeat."""
        ratios = [b / h for b, h in zip(base, hybrid, strict=True)]
        return cls(min=min(ratios), median=statistics.median(ratios), max=max(ratios))

    def show(self) -> str:
        """`1.23x (1.08 to 1.28)`."""
        return f"{self.median:.2f}x ({self.min:.2f} to {self.max:.2f})"


class Load(Record):
    """What an engine is asked to do: so many requests, never more than `concurrency` of them at once."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int


class Served(Record):
    """One model under one load, once.

    Attributes:
        seconds, cpu_seconds: from the first request in to the last token out; CPU time of all threads.
        steps: of the engine.
        ttft, tpot: seconds to a request's first token, and from one token to the next; median over requests.
        running: requests in work at once, mean over the engine's steps.
        preemptions: how often a request lost its cache and began again.
        prefix_hit_rate: share of prompt tokens found in a prefix cache; the bench has it switched off.
        kv_used, kv_used_last: share of the cache's blocks in use, at most and at the end.
        peak_memory: bytes; of the device on CUDA, of the process elsewhere.
    """

    seconds: float
    cpu_seconds: float
    steps: int
    output_tokens: int
    ttft: float
    ttft_p99: float
    tpot: float
    tpot_p99: float
    running: float
    running_max: int
    preemptions: int
    prefix_hit_rate: float
    kv_used: float
    kv_used_last: float
    peak_memory: int


class ServingCell(Record):
    """Base and hybrid under one load, in turn.

    Attributes:
        kv: `ample`, `limited`, or bytes as asked for; `kv_memory` is what both engines got, in bytes.
        kv_bytes_per_token: cache of one sequence of this length in the engine, divided by its tokens.
        kv_capacity: tokens of such sequences that fit.
        runs: per model, every repeat.
        throughput, cpu_throughput: output tokens per second, hybrid over base, repeat by repeat.
    """

    kv: str
    kv_memory: int
    load: Load
    kv_bytes_per_token: dict[str, float]
    kv_capacity: dict[str, int]
    runs: dict[str, list[Served]]
    throughput: Ratio
    cpu_throughput: Ratio

    def median(self, model: str, figure: str) -> float:
        return statistics.median(getattr(served, figure) for served in self.runs[model])

    def tokens_per_second(self, model: str, clock: str = "seconds") -> float:
        return statistics.median(served.output_tokens / getattr(served, clock) for served in self.runs[model])


class Bench(Artifact):
    """`bench.json`.

    Attributes:
        settings: engine, batch, context, tokens, repeats, threads, dtype, device.
        seconds: per model and phase, every repeat; on vLLM a phase is a load.
        speed: ratios of base time over hybrid time, so more is faster.
        kv_bytes_per_token: cache bytes of one sequence of `context` tokens, divided by its tokens.
        serving: what vLLM did under load.
    """

    settings: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]
    speed: dict[str, Ratio]
    context: int
    kv_bytes_per_token: dict[str, float]
    parameters: dict[str, int]
    serving: list[ServingCell] = []

    def median_seconds(self, model: str, phase: str) -> float:
        return statistics.median(self.seconds[model][phase])


class Agreement(Record):
    """How alike two rankings of layers are: Spearman's correlation, `rank.count` layers."""

    metric: str
    mixer: str
    where: str
    rank: Estimate


class Transfer(Record):
    """A plan made on one sensitivity, by another's damages: its loss, and that of the other's own plan, in nats."""

    made_on: str
    judged_on: str
    kv_reduction: float
    loss: float
    own: float


class Stability(Artifact):
    """`stability.json`."""

    probes: list[Agreement]
    files: list[Agreement]
    transfer: list[Transfer]


class Trial(Artifact):
    """One plan of one model, under one seed: before and after healing.

    Attributes:
        before, after: damages on the held-out split, per metric and sequence.
    """

    layers: list[str]
    kv_share: float
    before: dict[str, list[float]]
    after: dict[str, list[float]]
    healing_tokens: int


class Entry(Record):
    """One way of choosing a plan, on one model under one seed.

    Attributes:
        trial: the plan's, which other ways may have chosen as well; None where it found none.
        loss, recall_lost: weighted held-out loss in nats and recall lost, `before` and `after` healing.
        against: after healing, the default's loss less this one's, paired by sequence: negative where the default wins.
        verdict: of the default: `wins`, `ties`, `loses`; `same plan`, or why there is no plan.
        cost: of choosing, in forward passes over the data that analysis looks at.
    """

    model: str
    seed: int
    name: str
    trial: str | None
    plan: list[str] = []
    kv_share: float | None = None
    loss: dict[str, Estimate] = {}
    recall_lost: dict[str, Estimate] = {}
    against: dict[str, Estimate] = {}
    verdict: dict[str, str] = {}
    cost: float | None = None


class Comparison(Artifact):
    """`comparison.json`."""

    default: str
    entries: list[Entry]


class Result(Artifact):
    """`result.json`: the truth about a run, of which the report is a view."""

    model: dict[str, Any]
    plan: dict[str, list[Any]]
    quality: dict[str, dict[str, Any]]
    cost: dict[str, Any]
    speed: dict[str, Ratio]
    tasks: dict[str, dict[str, dict[str, float | None]]] = {}


AnyRecord = TypeVar("AnyRecord", bound=Record)
AnyArtifact = TypeVar("AnyArtifact", bound=Artifact)


def validate(kind: type[AnyRecord], raw: Any, where: str, error: type[LayerBoostError]) -> AnyRecord:
    """A record of this kind from plain values; what is wrong is said in one line."""
    try:
        return kind.model_validate(raw)
    except pydantic.ValidationError as trouble:
        raise error(f"{where}: {_first_trouble(kind, trouble)}") from None


def _first_trouble(kind: type[pydantic.BaseModel], trouble: pydantic.ValidationError) -> str:
    problems = trouble.errors(include_url=False, include_context=False)
    # a misspelt key is missing as well: the spelling is the better hint
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    place = ".".join(str(part) for part in first["loc"] if part != "[key]")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    for n, part in enumerate(first["loc"]):
        name, colon, value = str(part).partition(":")
        if n and colon:  # {text_kl:1} is one key to YAML
            where = ".".join(str(part) for part in first["loc"][:n])
            return f"{where}: write {{{name}: {value}}}, with a space behind the colon{more}"
    if first["type"] == "extra_forbidden":
        known = _fields_at(kind, first["loc"][:-1])
        return f"unknown key {place}; {_hint(kind, first['loc'], known)}{more}"
    if first["type"] == "missing":
        return f"key {place} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    if message == first["msg"]:  # pydantic's own words
        message = message.replace("Input should be", "must be")
        if place and not isinstance(first["input"], (dict, list, pydantic.BaseModel)):
            message += f", found {first['input']!r:.80}"
    return f"{place}: {message}{more}" if place else f"{message}{more}"


def _hint(kind: Any, place: tuple[int | str, ...], known: list[str]) -> str:
    """What an unknown key may have been meant to be."""
    *before, key = (str(part) for part in place)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"did you mean {'.'.join([*before, close[0]])}?"
    inside = [section for section in known if key in _fields_at(kind, (*place[:-1], section))]
    if inside:
        return f"did you mean {' or '.join('.'.join([*before, section, key]) for section in inside)}?"
    return f"known keys: {', '.join(known)}"


def _fields_at(kind: Any, place: tuple[int | str, ...]) -> list[str]:
    """Keys that the record at this place of a document may have."""
    for part in place:
        kind = _record_in(kind)
        if isinstance(part, str) and part in getattr(kind, "model_fields", {}):
            kind = kind.model_fields[part].annotation
    kind = _record_in(kind)
    return [field.alias or name for name, field in getattr(kind, "model_fields", {}).items()]


def _record_in(kind: Any) -> Any:
    """The record class inside `list[X]`, `dict[str, X]` or `X | None`."""
    while typing.get_origin(kind) is not None or isinstance(kind, types.UnionType):
        inner = [a for a in typing.get_args(kind) if a not in (type(None), str, int)]
        if not inner:
            return kind
        kind = inner[-1]
    return kind


def read_json(path: Path, error: type[LayerBoostError] = UsageError) -> dict[str, Any]:
    """A JSON object from a file; anything else is an error of the given kind, in one line."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except IsADirectoryError:
        raise error(f"{path} is a folder; a JSON file is needed") from None
    except json.JSONDecodeError as trouble:
        raise error(f"{path} is not JSON: line {trouble.lineno}, column {trouble.colno}: {trouble.msg}") from None
    except (OSError, ValueError, RecursionError) as trouble:
        raise error(f"{path} cannot be read: {trouble}") from None
    if not isinstance(raw, dict):
        raise error(f"{path} must hold one JSON object, found {type(raw).__name__}")
    return raw


def load(kind: type[AnyArtifact], path: Path, error: type[LayerBoostError] = PlanError) -> AnyArtifact:
    """An artifact from its file, every key checked."""
    if not path.exists():
        raise error(f"{path} does not exist; name a {_file_name(kind)}")
    raw = read_json(path, error)
    kinds = _kinds(raw)
    if kinds and kind not in kinds:
        raise error(f"{path} is a {_file_name(kinds[0])}; a {_file_name(kind)} is needed")
    found = raw.get("schema")
    if found != 1 or isinstance(found, bool):
        raise error(f"{path}: schema must be 1, found {found!r}; this is layerboost {__version__}")
    if kind is Plan:
        parse_layers(raw.get("layers"), str(path))  # names the layer, where the general message names a path
    return validate(kind, raw, str(path), error)


def _kinds(raw: dict[str, Any]) -> list[type[Artifact]]:
    """Artifacts whose keys these are."""
    return [kind for kind in Artifact.__subclasses__() if _fits(raw, kind)]


def _fits(raw: dict[str, Any], kind: type[Record]) -> bool:
    fields = {field.alias or name: field for name, field in kind.model_fields.items()}
    needed = {name for name, field in fields.items() if field.is_required() or name == "schema"}
    return needed <= set(raw) <= set(fields)


def _file_name(kind: type[Record]) -> str:
    return f"{kind.__name__.lower()}.json"


def check_output_file(path: Path, kind: type[Record]) -> None:
    """Say what is wrong with a place before the work that ends there.

    Raises:
        UsageError: writing this file would overwrite something else than another of its kind.
        EnvironmentTrouble: its folder cannot be written to.
    """
    above = _standing(path.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        what = "cannot be written to" if above.is_dir() else "is a file"
        raise EnvironmentTrouble(f"{path} cannot be written: {above} {what}; choose a place that can be written to")
    if not os.path.lexists(path) or (path.is_file() and not path.stat().st_size):
        return
    try:
        same = path.is_file() and _fits(read_json(path), kind)
    except UsageError:
        same = False
    if not same:
        raise UsageError(f"{path} exists and is no {_file_name(kind)} of layerboost; name another --out, or remove it")


def to_json(artifact: Record) -> str:
    return json.dumps(artifact.model_dump(mode="json", exclude_none=isinstance(artifact, Plan)), indent=1) + "\n"


def save(artifact: Artifact, path: Path) -> None:
    write_text(path, to_json(artifact))


@contextlib.contextmanager
def disk_trouble(path: Path) -> Iterator[None]:
    """Say what the file system refused, and why, as a user error."""
    try:
        yield
    except OSError as trouble:
        if trouble.errno is None:
            raise
        advice = "free some space and run the same command again"
        if trouble.errno not in (errno.ENOSPC, errno.EDQUOT):
            advice = "choose a place that can be written to"
        raise EnvironmentTrouble(f"{path} cannot be written: {trouble.strerror}; {advice}") from trouble


def write_text(path: Path, text: str) -> None:
    """Replace a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk_trouble(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device would be replaced by a file of its name
            what = "a folder" if path.is_dir() else "no regular file"
            raise EnvironmentTrouble(f"{path} cannot be written: it is {what}; name a file")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)


MANIFEST, HEALING, CARD = "manifest.json", "healing.json", "README.md"


@contextlib.contextmanager
def publish_folder(final: Path, inputs: dict[str, str] | None = None) -> Iterator[Path]:
    """A temporary folder that takes the final name, with a manifest, if the block succeeds; else it goes.

    A folder that stands there already is replaced if LayerBoost made it.

    Raises:
        UsageError: the name is taken by something else.
        EnvironmentTrouble: the disk is full, or another process writes the same folder.
    """
    check_output_folder(final)
    final = final.resolve()
    partial, old = final.with_name(f".{final.name}.partial"), final.with_name(f".{final.name}.old")
    with disk_trouble(final):
        partial.mkdir(parents=True, exist_ok=True)
        with lock(partial):
            for leftover in partial.iterdir():
                if leftover.name != LOCK:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            try:
                yield partial
                _write_manifest(partial, inputs or {})
                if final.exists():
                    if old.exists():
                        shutil.rmtree(old)
                    os.rename(final, old)
                os.rename(partial, final)
                (final / LOCK).unlink(missing_ok=True)
                _sync(final.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                if old.exists() and not final.exists():
                    os.rename(old, final)
        shutil.rmtree(old, ignore_errors=True)


def check_output_folder(final: Path) -> None:
    """Raises UsageError if writing this folder would overwrite something that is not LayerBoost's."""
    if not final.exists():
        return
    if not final.is_dir():
        raise UsageError(f"{final} is a file; name a folder")
    inside = {path.name for path in final.iterdir()} - {LOCK}
    if inside and not inside <= _written(final):
        raise UsageError(f"{final} exists and was not written by layerboost; name another --out, or remove it")


def _written(folder: Path) -> set[str]:
    """Names at the top of a folder that its manifest says layerboost wrote."""
    try:
        manifest = read_json(folder / MANIFEST)
    except UsageError:
        return set()
    files = manifest.get("files")
    if manifest.get("schema") != 1 or not isinstance(files, dict):
        return set()
    return {MANIFEST, *(name.partition("/")[0] for name in files)}


def free_bytes(out: Path) -> int:
    """Bytes free on the disk where a file or folder is, or would be."""
    return shutil.disk_usage(_standing(out.absolute())).free


def _standing(path: Path) -> Path:
    """A path, or what exists of it."""
    return next(part for part in (path, *path.parents) if part.exists())


def check_space(out: Path, needed: int) -> None:
    """Raises EnvironmentTrouble if the disk lacks the bytes."""
    free = free_bytes(out)
    if free < needed:
        raise EnvironmentTrouble(
            f"{out} needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; free some space or name another "
            "--out"
        )


def _write_manifest(folder: Path, inputs: dict[str, str]) -> None:
    files = {}
    mode = folder.stat().st_mode & 0o666  # a new file's; safetensors lets only the owner read its own
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != LOCK):
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = {
                "bytes": path.stat().st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
            os.fsync(file.fileno())
        path.chmod(mode)
    write_text(folder / MANIFEST, json.dumps({"schema": 1, "inputs": inputs, "files": files}, indent=1) + "\n")
    for path in [p for p in folder.rglob("*") if p.is_dir()]:
        _sync(path)


def intact(folder: Path, *, deep: bool = False) -> bool:
    """Whether a published folder is as it was written: every file there with its size, and if `deep` its sha256."""
    return first_damaged(folder, deep=deep) is None


def check_intact(folder: Path) -> None:
    """Raises CheckpointError if a file of a folder that says what was written there is not as it was written."""
    if (folder / MANIFEST).exists() and (name := first_damaged(folder, deep=True)):
        raise CheckpointError(f"{folder}: {name} is missing or not as it was written; fetch or make it again")


def first_damaged(folder: Path, *, deep: bool = False) -> str | None:
    """The first file that is missing or not as it was written; model cards may be edited."""
    name = MANIFEST
    try:
        for name, record in read_json(folder / MANIFEST)["files"].items():
            path = folder / name
            if name == CARD:
                continue
            if path.stat().st_size != record["bytes"] or (deep and file_digest(path) != record["sha256"]):
                return str(name)
    except (UsageError, CheckpointError, OSError, KeyError, TypeError, AttributeError):
        return str(name)
    return None


def recorded_inputs(path: Path, *, damaged: bool = False) -> dict[str, str] | None:
    """What a file or folder was made from; None if it is missing, or not intact and it is not asked for `damaged`."""
    if path.is_dir() and not damaged and not intact(path, deep=True):
        return None
    try:
        inputs = read_json(path / MANIFEST if path.is_dir() else path).get("inputs")
    except UsageError:
        return None
    return inputs if isinstance(inputs, dict) else None


LOCK = ".lock"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer per folder. The operating system lets go of the lock when its owner dies, however it dies."""
    with disk_trouble(folder):
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        holder = filelock.FileLock(folder / LOCK)
        try:
            holder.acquire(timeout=0)
        except filelock.Timeout:
            raise EnvironmentTrouble(
                f"{folder} is being written by another layerboost process; wait for it, or name another --out"
            ) from None
    try:
        yield
    finally:
        if made and folder.exists() and os.listdir(folder) == [LOCK]:  # nothing came of it
            shutil.rmtree(folder, ignore_errors=True)
        holder.release()


def file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as trouble:
        raise CheckpointError(f"{path} cannot be read: {trouble.strerror}") from None


def text_digest(value: Any) -> str:
    """sha256 over a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
