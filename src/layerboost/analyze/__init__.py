"""analyze: how much worse does the model get when one layer's attention is removed, or windowed?

Damage is measured for every layer and every mixer, because they hurt different layers: a layer that cannot lose its
attention is often one that looks only a few tokens back.
"""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from layerboost.analyze.estimators import ESTIMATOR, ESTIMATORS, estimate_layers
from layerboost.analyze.looking import Looking, kinds
from layerboost.artifacts import (
    Candidate,
    Cost,
    Damage,
    ModelRecord,
    Resolution,
    Sensitivity,
    Share,
    Tokens,
    file_digest,
    save,
)
from layerboost.damage import DEFAULT_WEIGHTS, Weights, damages, levels, ranking, resampled_losses
from layerboost.data.samples import TEXT, DataConfig, data_inputs
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError, UsageError
from layerboost.knapsack import DEFAULT_KV_REDUCTION, options, solve
from layerboost.layer_plan import KEEP, LayerPlan, full_plan
from layerboost.measured import Measured, kept_beside
from layerboost.model.hybrid import Hybrid
from layerboost.model.loading import (
    describe,
    find_model,
    load_original,
    load_tokenizer,
    pick_device,
    read_config,
)
from layerboost.model.streaming import stream_original
from layerboost.passes import Plans, Resident, Scorer, ranks, shared
from layerboost.progress import Advance, progress, say
from layerboost.provenance import provenance
from layerboost.scoring import batch_rows, estimate
from layerboost.tasks import Asked, load_tasks, task_files, task_scores

BENCHMARKS = "benchmarks"
_STABILITY_RESAMPLES = 100


class Config(DataConfig):
    """What `analyze` is told.

    Attributes:
        windows: window sizes to try in every layer, in tokens; removal is always tried. None is two sizes that suit the
            model's context: 16 and 64 at 1,024 tokens, 64 and 512 from 8,192.
        mixers: further mixers to try in every layer, as a plan's entries.
        texts: sequences of text.
        answers: sequences of each recall probe and distance.
        length: tokens per sequence.
        distance: fewest tokens between an answer and its source, or several; None is half the length.
        long_answers, long_length: questions about what stands in long prompts, and their length in tokens; None is
            four times `length`, as far as the context allows.
        generations, new_tokens: greedy completions by the original, and their length, that others have to follow.
        prompts: JSON lines with `text`, or `prompt` and `answer`, of a user's own.
        tasks: lm-eval tasks; `task_limit` documents of each, `task_folder` with further task files.
        estimators: cheap estimates, of one to four passes each, to set beside the measured damage.
        confidence: of what is called different; intervals of single damages are of 95 %.
        weights: how damages add up to the loss that layers are ranked by.
        until_resolved: look at more data until the plan at `kv_reduction` is stable, or `max_tokens` or all
            text were looked at.
        stream: read layers from disk one after the other, for models larger than memory.
    """

    windows: list[Annotated[int, Field(ge=1)]] | None = None
    mixers: list[LayerPlan] = Field([])
    texts: int = Field(32, ge=2)
    answers: int = Field(64, ge=2)
    length: int = Field(256, ge=64)
    distance: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = (
        None
    )
    long_answers: int = Field(0, ge=0)
    long_length: int | None = Field(None, ge=64)
    generations: int = Field(0, ge=0)
    new_tokens: int = Field(16, ge=1)
    prompts: Path | None = None
    tasks: list[str] = Field([])
    task_limit: int | None = Field(100, ge=2)
    task_folder: Path | None = None
    estimators: list[ESTIMATOR] = Field(list(ESTIMATORS))
    confidence: float = Field(0.95, gt=0.5, lt=1)
    weights: Weights = DEFAULT_WEIGHTS
    until_resolved: bool = False
    kv_reduction: Share | None = None
    max_tokens: Tokens = 1_000_000
    stream: bool = False


def inputs(model: ModelRecord, folder: Path, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    found = {"model": model.digest, **data_inputs(folder, config)}
    if config.prompts is not None:
        found["prompts"] = file_digest(config.prompts)
    return found | task_files(config.task_folder)


def run(model: str | Path, config: Config | None = None, *, out: Path | None = None) -> Sensitivity:
    """Measure a model's sensitivity, on the train split alone.

    Several processes, started by torchrun or `accelerate launch`, share the candidates; the first writes the file.

    Args:
        model: folder or hub id of a base model.
        out: where to write `sensitivity.json`.

    Raises:
        CheckpointError: the model cannot be read, or computes values that are not finite.
        DataError: too little text, or a distance within reach of a window.
        UsageError: settings that exclude one another, weights of what is not measured, or an unknown task.
    """
    config = config or Config()
    if config.stream and (config.tasks or config.generations):
        raise UsageError("stream reads layers from disk for each pass; leave tasks and generations out")
    if config.stream and config.estimators:
        say("stream: the cheap estimates, which take whole passes of their own, are left out")
    check_weights(config, config.weights)
    asked = load_tasks(config.tasks, config.task_folder)  # now: a name that is none is not told after hours
    ranks()  # of several processes each takes a device of its own, before a model goes there
    folder = find_model(model)
    record = describe(model, folder, read_config(folder))
    device = pick_device(config.device)
    dtype = torch.float32 if device == "cpu" else None
    loaded, resident = (
        stream_original(folder, dtype=dtype, device=device)
        if config.stream
        else (load_original(folder, dtype=dtype, device=device), None)
    )
    with kept_beside(out, record.digest, device, str(loaded.dtype)) as kept:
        sensitivity = _measure(loaded, resident, record, folder, config, asked, kept)
        if out is not None and ranks()[0] == 0:
            save(sensitivity, out)
    return sensitivity


def _measure(
    model: Hybrid,
    resident: Resident | None,
    record: ModelRecord,
    folder: Path,
    config: Config,
    asked: Asked,
    kept: Measured,
) -> Sensitivity:
    windows = windows_of(config, record.context)
    candidates = candidates_for(record, windows, config.mixers)
    looking = Looking(model, load_tokenizer(folder), config, windows)
    plans = [full_plan(record.num_layers), *one_changed(candidates)]
    found: list[Metrics] = [{} for _ in plans]
    tokens, turn = 0, 0
    costs: dict[str, Cost] = {}
    resolution: Resolution | None = None
    while resolution is None or (config.until_resolved and resolution.stopped is None):
        started = time.monotonic()
        data = looking.data(turn)
        scorer = Scorer(model, data, resident, kept)
        with progress("analyze", scorer.steps(len(plans)), scorer.known(plans)) as advance:
            _extend(found, _damages(scorer(plans, advance)))
        tokens += scorer.tokens
        _add_cost(costs, "measured", Cost(tokens=scorer.tokens, forwards=scorer.forwards, seconds=_since(started)))
        if turn == 0:
            _extend(found, _once(model, looking, data[TEXT], asked, candidates, plans, costs, kept))
        layers = _table(found[1:], candidates)
        draft = Sensitivity(model=record, layers=layers)
        turn += 1
        end = "token cap" if tokens + scorer.tokens > config.max_tokens else None
        if config.until_resolved and end is None and not looking.has_text(turn):
            end = "no more text"
        resolution = _resolve(draft, config, end)
    return Sensitivity(
        model=record, layers=layers, baseline={metric: _summary(v) for metric, v in found[0].items()}, costs=costs,
        resolution=resolution, inputs=inputs(record, folder, config),
        provenance=provenance(
            config, length=looking.length, distance=looking.distances, corpus=looking.corpus.name,
            corpus_digest=looking.corpus.digest, tokens=tokens,
            seconds=round(sum(c.seconds for c in costs.values()), 1),
        ),
    )  # fmt: skip


def check_weights(config: Config, metrics: Iterable[str], setting: str = "weights") -> None:
    """Raises UsageError for a metric that an analysis with these settings does not measure, which may take hours."""
    nothing = {f"{kind}.{score}": np.zeros(0) for kind in kinds(config) for score in ("kl", "nll", "hit", "lead")}
    measured = [*damages(nothing, nothing), *([] if config.stream else config.estimators)]
    if config.tasks:
        measured += [*(f"task:{task}" for task in config.tasks), BENCHMARKS]
    for metric in metrics:
        if metric not in measured:
            raise UsageError(
                f"{setting}: {metric} is not measured with these settings; it is one of {', '.join(measured)}"
            )


def windows_of(config: Config, context: int) -> list[int]:
    """Those that an analysis tries, tokens."""
    return default_windows(context) if config.windows is None else config.windows


def default_windows(context: int) -> list[int]:
    """A narrow and a wide window, in tokens; one where the context is short."""
    return sorted({min(max(context // 64, 16), 64), min(max(context // 16, 16), 512)})


def candidates_for(model: ModelRecord, windows: list[int], mixers: Sequence[LayerPlan] = ()) -> list[list[LayerPlan]]:
    """Per layer: removal, and each window that is narrower than what the layer sees anyway; then further mixers, as far
    as they see no more than the layer does.

    Raises:
        UsageError: a further mixer is there already, or keeps the layer as it is.
    """
    tried = [LayerPlan("no_attention"), *(LayerPlan("sliding_attention", w) for w in sorted(set(windows)))]
    for mixer in mixers:
        if mixer.mixer == "full_attention" or any(mixer.alike(other) for other in tried):
            raise UsageError(f"mixers: {mixer.label} is tried anyway; leave it out")
        tried.append(mixer)
    return [[plan for plan in tried if plan.narrows(native)] for native in model.native_windows]


def one_changed(candidates: list[list[LayerPlan]]) -> list[list[LayerPlan]]:
    """For every layer and candidate, the plan that changes that layer alone."""
    return [
        [plan if i == layer else KEEP for i in range(len(candidates))]
        for layer, tried in enumerate(candidates)
        for plan in tried
    ]


Metrics = dict[str, np.ndarray]  # per sequence


def _damages(scores: list[Metrics]) -> list[Metrics]:
    """Of every plan, and in place of the untouched model's its own values."""
    return [levels(scores[0]), *(damages(scores[0], changed) for changed in scores[1:])]


def _extend(found: list[Metrics], more: list[Metrics]) -> None:
    for known, new in zip(found, more, strict=True):
        for metric, values in new.items():
            known[metric] = np.concatenate([known[metric], values]) if metric in known else values


def _add_cost(costs: dict[str, Cost], name: str, cost: Cost) -> None:
    known = costs.get(name)
    if known is not None:
        cost = Cost(
            tokens=known.tokens + cost.tokens, forwards=known.forwards + cost.forwards,
            seconds=known.seconds + cost.seconds,
        )  # fmt: skip
    costs[name] = cost


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _once(
    model: Hybrid, looking: Looking, text: Sequences, asked: Asked, candidates: list[list[LayerPlan]],
    plans: list[list[LayerPlan]], costs: dict[str, Cost], kept: Measured,
) -> list[Metrics]:  # fmt: skip
    """Cheap estimates and benchmark tasks, which more data would not make better."""
    config = looking.config
    found: list[Metrics] = [{} for _ in plans]
    if config.estimators and not config.stream:
        length, hidden = text.tokens.shape[1], model.config.hidden_size
        rows = batch_rows(length, model.config.vocab_size, hidden, 4 * len(candidates))  # all layers are held at once
        values, took = estimate_layers(model, text, candidates, config.estimators, rows)
        costs |= took
        places = [(layer, n) for layer, tried in enumerate(candidates) for n in range(len(tried))]
        for name, by_place in values.items():
            for place, metrics in zip(places, found[1:], strict=True):
                metrics[name] = by_place[place]
    if asked:
        started = time.monotonic()
        spent: list[float] = []

        def score(some: Plans, advance: Advance) -> list[dict[str, np.ndarray]]:
            scores, forwards = task_scores(
                model, looking.tokenizer, some, asked, limit=config.task_limit, advance=advance, kept=kept
            )
            spent.append(forwards)
            return scores

        with progress("tasks", len(plans)) as advance:
            scores = shared(plans, score, advance)
        documents = sum(len(values) for values in scores[0].values())
        costs["tasks"] = Cost(tokens=documents, forwards=sum(spent), seconds=_since(started))
        for n, metrics in enumerate(found):
            for task, own in scores[n].items():
                metrics[f"task:{task}"] = own if n == 0 else scores[0][task] - own
            metrics[BENCHMARKS] = _average([metrics[f"task:{task}"] for task in scores[n]])
    return found


def _average(tasks: list[np.ndarray]) -> np.ndarray:
    """Every task counts the same, however many documents it has: their mean is the mean of the tasks' means.

    Source: arXiv 2604.22050, equation 3.
    """
    documents = sum(map(len, tasks))
    return np.concatenate([values * documents / (len(tasks) * len(values)) for values in tasks])


def _table(found: list[Metrics], candidates: list[list[LayerPlan]]) -> list[list[Candidate]]:
    metrics = iter(found)
    return [
        [Candidate.of(plan, {name: _summary(values) for name, values in next(metrics).items()}) for plan in tried]
        for tried in candidates
    ]


def _summary(values: np.ndarray) -> Damage:
    if not np.isfinite(values).all():
        raise CheckpointError("the model computes losses that are not finite; check its weights")
    rounded = np.round(values, 9)  # estimates can be small
    found = estimate(rounded)
    return Damage(mean=found.mean, low=found.low, high=found.high, per_sequence=rounded.tolist())


def _resolve(sensitivity: Sensitivity, config: Config, end: str | None) -> Resolution:
    """What can be told apart, and with `until_resolved` whether to stop; `end` says why there is no more to look at."""
    weights, confidence = config.weights, config.confidence
    kv_reduction = config.kv_reduction
    if config.until_resolved and kv_reduction is None:
        kv_reduction = DEFAULT_KV_REDUCTION
    stability = None if kv_reduction is None else plan_stability(sensitivity, weights, kv_reduction)
    stopped = None
    if config.until_resolved and stability is not None:
        stopped = "stable" if stability >= confidence else end
        say(f"the plan comes out the same on {stability:.0%} of resampled data{', ' + stopped if stopped else ''}")
    return Resolution(
        confidence=confidence, weights=weights, ranking=ranking(sensitivity, weights, confidence),
        kv_reduction=kv_reduction, stability=stability, stopped=stopped,
    )  # fmt: skip


def plan_stability(sensitivity: Sensitivity, weights: dict[str, float], kv_reduction: float) -> float:
    """Share of resampled data on which the additive plan at this budget is the one that all data give; the cache is
    counted for as many tokens as `plan` counts."""
    context = sensitivity.model.usual_context
    losses = resampled_losses(sensitivity, weights, _STABILITY_RESAMPLES)
    count = sensitivity.model.num_layers

    def plan(own: list[Any] | None) -> list[LayerPlan] | None:
        return solve(options(sensitivity, context, weights, own), count, minimise="loss", kv=1 - kv_reduction)

    chosen = plan(None)
    same = [plan([np.maximum(layer[:, r], 0.0) for layer in losses]) == chosen for r in range(_STABILITY_RESAMPLES)]
    return float(np.mean(same))
