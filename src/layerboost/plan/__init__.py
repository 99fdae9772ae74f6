"""plan: which layers keep softmax attention, get a window, or lose attention, for a stated budget?

A planner is a function of sensitivity, cost and budget (`milp`, `tiers`, `patterns`), or measures the model as well
(`greedy`, `gates`).
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field

from layerboost.artifacts import (
    Bytes,
    Cost,
    FrontPoint,
    Plan,
    Record,
    Sensitivity,
    Share,
    Times,
    Tokens,
    WholeBytes,
    load,
    read_json,
    save,
    text_digest,
)
from layerboost.damage import (
    DEFAULT_WEIGHTS,
    Weights,
    candidate_loss,
    check_sensitivity,
    damages,
    predicted_loss,
    reason,
    weighted,
)
from layerboost.data.corpus import open_corpus
from layerboost.data.probes import PROBES
from layerboost.data.samples import TEXT, DataConfig, data_inputs, probe_lengths, samples, sequence_length
from layerboost.data.sequences import Sequences
from layerboost.errors import DataError, PlanError
from layerboost.knapsack import DEFAULT_KV_REDUCTION, options
from layerboost.layer_plan import KEEP, LayerPlan, short
from layerboost.measured import Measured, kept_beside
from layerboost.model.config import check_layers
from layerboost.model.hybrid import Hybrid
from layerboost.model.loading import describe, find_model, load_original, load_tokenizer, pick_device, read_config
from layerboost.passes import Scorer, ranks
from layerboost.plan.budget import Budget
from layerboost.plan.gates import gate_losses, learn_gates
from layerboost.plan.greedy import Search
from layerboost.plan.milp import plan_milp, thinned
from layerboost.plan.patterns import plan_periodic, plan_random, plan_uniform
from layerboost.plan.tiers import plan_tiers
from layerboost.progress import progress, say
from layerboost.provenance import provenance

PLANNER = Literal["greedy", "milp", "gates", "tiers", "uniform", "periodic", "random"]
_FRONT_POINTS = 24
# of the search's best plans so many are measured on so many times its data, for at most this part of its limit
_FINALISTS, _MORE_DATA, _FINAL_SHARE = 6, 3, 3
_OF_LOAD = ("device_profile", "concurrency", "prompt_tokens", "output_tokens", "kv_memory")
MEASURED = ("text_kl", "text_nll", "recall_kl", "recall_nll", *PROBES)


class AtLeast(Record):
    """Fewest layers of each mixer."""

    full_attention: int = Field(0, ge=0)
    sliding_attention: int = Field(0, ge=0)
    no_attention: int = Field(0, ge=0)


class Tiers(Record):
    """The paper's rule: one score per layer, cut twice.

    Attributes:
        score: which damage of removing attention ranks the layers.
        full, sliding: how many layers keep softmax, and how many of the next get a window; the rest lose attention.
        keep_above, remove_below: the same as thresholds on the score. With neither, the budget decides.
        window: of the middle tier; None is the widest that was measured, or with a budget the best of them.
    """

    score: str = "recall_kl"
    full: int | None = Field(None, ge=0)
    sliding: int | None = Field(None, ge=0)
    keep_above: float | None = None
    remove_below: float | None = None
    window: int | None = Field(None, ge=1)


class Measuring(Record):
    """What planners that measure the model look at, and how much.

    Attributes:
        texts, answers: sequences of text of the train split, and of each recall probe.
        length, distance: of them, as for `analyze`.
        naive_passes: most that `greedy` may cost, in passes of 1 + layers x mixers forwards.
        steps, batch, learning_rate: of learning `gates`; rows of text and of probes per step.
    """

    texts: int = Field(32, ge=2)
    answers: int = Field(32, ge=2)
    length: int = Field(256, ge=64)
    distance: int | None = Field(None, ge=1)
    naive_passes: float = Field(5.0, gt=0)
    steps: int = Field(100, ge=1)
    batch: int = Field(4, ge=1)
    learning_rate: float = Field(0.1, gt=0)


class Config(DataConfig):
    """What `plan` is told.

    Attributes:
        planner: None is `greedy` where the model is at hand, and `milp` elsewhere.
        kv_reduction: share of the KV cache to save, for one sequence of `context` tokens. Without any budget, 0.5.
        kv_bytes: most bytes of KV cache per token of such a sequence.
        full_layers: most layers that keep their attention.
        throughput: output tokens per second over the base model's, foretold on `device_profile` under `concurrency`
            requests of `prompt_tokens` and `output_tokens`, in `kv_memory` bytes (None: what the weights leave).
        max_loss: most loss, in nats per token; alone, as much cache is saved as it allows.
        context: tokens; None is the model's context, at most 4,096.
        engine: whose cache is counted: what a sequence holds, or with vLLM's blocks of `block_size` and padded groups.
        at_least: fewest layers of each mixer.
        weights: how damages add up to one loss.
        mixer: what `uniform` and `periodic` put in the place of attention; None is the widest window that fits.
        pilots, pilot_tokens: heal so many of the best plans for so many tokens, and take the one that does best on the
            validation split.
    """

    planner: PLANNER | None = None
    kv_reduction: Share | None = None
    kv_bytes: Bytes | None = None
    full_layers: int | None = Field(None, ge=0)
    throughput: Times | None = None
    max_loss: float | None = Field(None, ge=0)
    context: int | None = Field(None, ge=2)
    engine: Literal["transformers", "vllm"] = "transformers"
    block_size: int | None = Field(None, ge=1)
    device_profile: str = "h100"
    concurrency: int = Field(200, ge=1)
    prompt_tokens: int = Field(1_024, ge=1)
    output_tokens: int = Field(256, ge=1)
    kv_memory: WholeBytes | None = None
    at_least: AtLeast = AtLeast()
    weights: Weights = DEFAULT_WEIGHTS
    tiers: Tiers = Tiers()
    mixer: LayerPlan | None = None
    measuring: Measuring = Measuring()
    pilots: int = Field(0, ge=0)
    pilot_tokens: Annotated[Tokens, Field(ge=64)] = 50_000

    @property
    def has_budget(self) -> bool:
        limits = (self.kv_reduction, self.kv_bytes, self.full_layers, self.throughput, self.max_loss)
        return any(limit is not None for limit in limits)


class Pilot(Protocol):
    """Heals a plan of a model briefly."""

    def __call__(self, model: Path, layers: list[LayerPlan], config: Config, windows: list[int], /) -> float:
        """The loss on the validation split, on probes that no window reaches of any plan it is compared with."""

    def digest(self, model: Path, config: Config, /) -> str:
        """Of all that decides how they are healed."""


def inputs(
    sensitivity: Sensitivity, config: Config, model: Path | None = None, pilot: Pilot | None = None
) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    found = {
        "sensitivity": text_digest(sensitivity.model_dump(mode="json", exclude={"provenance", "costs"})),
        "settings": text_digest(config.model_dump(mode="json", exclude={"device", "text"})),
    }
    if config.throughput is not None and Path(config.device_profile).is_file():
        found["device"] = text_digest(read_json(Path(config.device_profile)))
    if model is not None:
        found |= {key: value for key, value in data_inputs(model, config).items() if key != "settings"}
        if config.pilots and pilot is not None:
            found["pilots"] = pilot.digest(model, config)
    return found


@dataclass
class Found:
    """What a planner came up with.

    Attributes:
        layers: the plan.
        others: further good plans, along the front or at the budget, the best at the budget first.
        losses: measured losses of whole plans, by their labels.
        cost: of measuring.
    """

    layers: list[LayerPlan]
    others: list[list[LayerPlan]] = dataclasses.field(default_factory=list)
    losses: dict[tuple[str, ...], float] = dataclasses.field(default_factory=dict)
    cost: Cost | None = None


def run(
    sensitivity: Sensitivity | Path, config: Config | None = None, *, model: str | Path | None = None,
    out: Path | None = None, pilot: Pilot | None = None,
) -> Plan:  # fmt: skip
    """Choose a mixer for every layer.

    Args:
        model: what the sensitivity was measured on, for planners that measure whole plans, and for throughput.
        pilot: heals plans briefly, where `pilots` asks for it.

    Raises:
        PlanError: the sensitivity cannot be read, the budget cannot be met, or the planner needs the model.
    """
    asked = config or Config()
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = load(Sensitivity, sensitivity)
    check_sensitivity(sensitivity)
    folder = None if model is None else find_model(model)
    planner = asked.planner or ("milp" if folder is None else "greedy")
    config = settled(asked, planner)
    model_config = None
    if folder is not None:
        model_config = read_config(folder)
        if describe(str(model), folder, model_config).digest != sensitivity.model.digest:
            raise PlanError(
                f"the sensitivity was measured on {sensitivity.model.name}, which {model} is not; analyze it"
            )
    elif planner in ("greedy", "gates") or config.pilots:
        raise PlanError(f"{'pilots' if config.pilots else planner} measures whole plans; name the model with --model")
    if config.pilots and pilot is None:
        raise PlanError("pilots are healed by the command line and by runs; leave them out here")
    budget = Budget(sensitivity.model, config, model_config)
    if planner not in ("greedy", "gates") and config.measuring != Measuring():
        say(f"measuring.* has no effect here: planner {planner} measures nothing")
    with kept_beside(out, sensitivity.model.digest, pick_device(config.device)) as kept:
        found = PLANNERS[planner](sensitivity, budget, config, folder, kept)
        check_layers(found.layers, sensitivity.model.native_windows, sensitivity.model.context)
        if config.pilots:
            found = _piloted(sensitivity, found, budget, config, folder, pilot, kept)
        plan = _plan(sensitivity, found, budget, config, inputs(sensitivity, asked, folder, pilot))
        mixers = {layer.mixer for layer in plan.layers}
        if mixers in ({"full_attention"}, {"no_attention"}):
            say(f"the budget leaves every layer {'as it was' if mixers == {'full_attention'} else 'without attention'}")
        if out is not None and ranks()[0] == 0:
            save(plan, out)
    return plan


def settled(config: Config, planner: PLANNER) -> Config:
    """With the planner, and with the default budget where none was given.

    Raises:
        PlanError: something was asked for that the planner would not look at.
    """
    cut = config.tiers.model_dump(exclude={"score", "window"}, exclude_none=True)
    if planner != "tiers" and config.tiers != Tiers():
        raise PlanError("tiers.* settings are for planner tiers; ask for it, or leave them out")
    if planner not in ("uniform", "periodic") and config.mixer is not None:
        raise PlanError("mixer is for the planners uniform and periodic; ask for one of them, or leave it out")
    if planner == "tiers" and cut and (config.has_budget or config.at_least != AtLeast()):
        raise PlanError(
            "tiers takes a budget or its own cuts: leave tiers.full, .sliding, .keep_above and .remove_below out"
        )
    if config.max_loss is not None and planner not in ("greedy", "milp"):
        raise PlanError(f"planner {planner} knows no max_loss; use greedy or milp, or another budget")
    if planner == "gates" and config.has_budget and config.kv_reduction is None and config.kv_bytes is None:
        raise PlanError("gates are learned against a limit on the cache; give kv_reduction or kv_bytes")
    of_load = [name for name in _OF_LOAD if getattr(config, name) != Config.model_fields[name].default]
    if config.throughput is None and of_load:
        raise PlanError(f"{', '.join(of_load)}: a throughput budget looks at that; set throughput too, or leave it out")
    if config.throughput is None and config.engine != "vllm" and config.block_size is not None:
        raise PlanError("block_size is for engine vllm; set engine=vllm too, or leave it out")
    unknown = [metric for metric in config.weights if metric not in MEASURED]
    if planner in ("greedy", "gates") and unknown:
        raise PlanError(
            f"{planner} measures {', '.join(MEASURED)}, not {unknown[0]}; choose other weights, or planner milp"
        )
    found: dict[str, Any] = {"planner": planner}
    if not config.has_budget and not cut:
        found["kv_reduction"] = DEFAULT_KV_REDUCTION
    return config.model_copy(update=found)


def _milp(sensitivity: Sensitivity, budget: Budget, config: Config, *_: Any) -> Found:
    layers, front = plan_milp(sensitivity, budget, config.weights)
    return Found(layers, front)


def _tiers(sensitivity: Sensitivity, budget: Budget, config: Config, *_: Any) -> Found:
    return Found(plan_tiers(sensitivity, config.tiers, budget, config.weights))


def _uniform(sensitivity: Sensitivity, budget: Budget, config: Config, *_: Any) -> Found:
    return Found(plan_uniform(sensitivity, budget, config.mixer))


def _periodic(sensitivity: Sensitivity, budget: Budget, config: Config, *_: Any) -> Found:
    return Found(plan_periodic(sensitivity, budget, config.mixer))


def _random(sensitivity: Sensitivity, budget: Budget, config: Config, *_: Any) -> Found:
    like, _front = plan_milp(sensitivity, budget, config.weights)
    return Found(plan_random(sensitivity, budget, like, config.seed))


def _greedy(sensitivity: Sensitivity, budget: Budget, config: Config, folder: Path | None, kept: Measured) -> Found:
    started = time.monotonic()
    model = _model(config, folder)
    candidates = [[c.plan for c in own] for own in sensitivity.layers]
    single = [[candidate_loss(c, config.weights) for c in own] for own in sensitivity.layers]
    scorer = Scorer(model, _data(model, sensitivity, config, folder), kept=kept)
    naive = 1 + sum(map(len, candidates))
    limit = config.measuring.naive_passes * naive
    finalists = min(_FINALISTS, int(limit / _FINAL_SHARE / _MORE_DATA) - 1)
    if budget.saves or finalists < 2:
        finalists = 0
    kept_back = (finalists + 1) * _MORE_DATA if finalists else 0
    with progress("plan", math.ceil(limit)) as advance:
        search = Search(scorer, candidates, single, config.weights, budget, limit - kept_back, advance)
        start, front = _additive_start(sensitivity, budget, config)
        layers = search.run(start, config.max_loss)
        met = sorted((plan for plan in search.known if budget.met(list(plan))), key=lambda plan: search.known[plan])
        data = _more_data(model, sensitivity, config, folder) if finalists and len(met) > 1 else {}
        if data:
            layers = _final(search, met[:finalists], Scorer(model, data, kept=kept))
            # more is known of these than of the others, whose losses may be luck
            met[:finalists] = sorted(met[:finalists], key=lambda plan: search.known[plan])
        search.check(layers, config.max_loss)
        advance(max(0, math.ceil(limit) - search.told))
    say(
        f"greedy: {len(search.known)} plans measured at the cost of {search.spent:.0f} forwards; trying every mixer in "
        f"every layer, and nothing shared, takes {naive}"
    )
    losses = {tuple(layer.label for layer in plan): loss for plan, loss in search.known.items()}
    others = [list(plan) for plan in [*met[:_FRONT_POINTS], *search.path]]
    cost = Cost(tokens=scorer.tokens, forwards=search.spent, seconds=time.monotonic() - started)
    return Found(list(layers), others + front, losses, cost)


def _final(search: Search, finalists: list[tuple[LayerPlan, ...]], scorer: Scorer) -> tuple[LayerPlan, ...]:
    """The best of the best on more data: a search that measures many plans finds those that its own data flatters."""
    base, *scores = scorer([search.start, *finalists])
    times = scorer.tokens / search.scorer.tokens
    search.spent += times * search.price([search.start, *finalists])
    for plan, found in zip(finalists, scores, strict=True):
        more = weighted(damages(base, found), search.weights)
        search.known[plan] = (search.known[plan] + times * more) / (1 + times)
    return min(finalists, key=lambda plan: search.known[plan])


def _additive_start(
    sensitivity: Sensitivity, budget: Budget, config: Config
) -> tuple[list[tuple[LayerPlan, ...]], list[list[LayerPlan]]]:
    try:
        layers, front = plan_milp(sensitivity, budget, config.weights)
    except PlanError:  # then nothing meets the budget, which the search finds as well and says
        return [], []
    return [tuple(layers)], front


def _gates(sensitivity: Sensitivity, budget: Budget, config: Config, folder: Path | None, _: Measured) -> Found:
    assert budget.kv_limit is not None  # as settled has seen to
    started = time.monotonic()
    model = _model(config, folder)
    data = _data(model, sensitivity, config, folder)
    candidates = [[c.plan for c in own] for own in sensitivity.layers]
    shares: list[list[float]] = [[] for _ in candidates]
    for option in options(sensitivity, budget.context, config.weights):
        shares[option.layer].append(option.kv)
    settings = config.measuring
    with progress("gates", settings.steps) as advance:
        gates, tokens = learn_gates(
            model, data, candidates, shares, budget.kv_limit, config.weights, steps=settings.steps,
            batch=settings.batch, learning_rate=settings.learning_rate, seed=config.seed, advance=advance,
        )  # fmt: skip
    layers, front = plan_milp(sensitivity, budget, config.weights, gate_losses(gates))
    seen = sum(sequences.tokens.numel() for sequences in data.values())
    mixers = 1 + sum(map(len, candidates)) / len(
        candidates
    )  # every candidate's attention runs, forwards and back again
    forwards = 3 * mixers * tokens / seen + 1
    return Found(layers, front, cost=Cost(tokens=tokens, forwards=forwards, seconds=time.monotonic() - started))


PLANNERS: dict[str, Callable[[Sensitivity, Budget, Config, Path | None, Measured], Found]] = {
    "greedy": _greedy, "milp": _milp, "gates": _gates, "tiers": _tiers, "uniform": _uniform, "periodic": _periodic,
    "random": _random,
}  # fmt: skip


def _model(config: Config, folder: Path | None) -> Hybrid:
    assert folder is not None
    ranks()  # of several processes each takes a device of its own, before a model goes there
    device = pick_device(config.device)
    return load_original(folder, dtype=torch.float32 if device == "cpu" else None, device=device)


def _data(
    model: Hybrid, sensitivity: Sensitivity, config: Config, folder: Path | None, turn: int = 0
) -> dict[str, Sequences]:
    """Of the train split, to measure whole plans on; another turn gives others."""
    assert folder is not None
    settings = config.measuring
    candidates = [[c.plan for c in own] for own in sensitivity.layers]
    length, distance = measuring_lengths(settings, candidates, sensitivity.model.context)
    return samples(
        open_corpus(config.text), load_tokenizer(folder), model.config.vocab_size, split="train",
        texts=settings.texts, answers=settings.answers, length=length, distance=distance, seed=config.seed, turn=turn,
    )  # fmt: skip


def _more_data(model: Hybrid, sensitivity: Sensitivity, config: Config, folder: Path | None) -> dict[str, Sequences]:
    """Several times as much as the search has seen, none of it the same; less where the text ends, or nothing."""
    parts = []
    with contextlib.suppress(DataError):
        for turn in range(1, 1 + _MORE_DATA):
            part = _data(model, sensitivity, config, folder, turn)
            if len(part[TEXT]) == config.measuring.texts:  # little text beside all answers would weigh as much
                parts.append(part)
    if not parts:
        say("greedy: there is no text that the search has not seen, so the best plans are not measured on more")
    return {kind: Sequences.concatenate([part[kind] for part in parts]) for kind in parts[0]} if parts else {}


def measuring_lengths(settings: Measuring, candidates: list[list[LayerPlan]], context: int) -> tuple[int, int]:
    """Length and distance of probes, tokens; raises DataError where a candidate's window reaches that far."""
    windows = [plan.window for own in candidates for plan in own if plan.window is not None]
    return probe_lengths(sequence_length(settings, context), settings.distance, windows, context)


def _piloted(
    sensitivity: Sensitivity, found: Found, budget: Budget, config: Config, folder: Path | None, pilot: Pilot | None,
    kept: Measured,
) -> Found:  # fmt: skip
    """The plan that does best after a brief healing, among the best few at the budget."""
    assert pilot is not None
    assert folder is not None
    if budget.saves:
        say("pilots: max_loss asks for the smallest cache, not for the best plan of a size, so none are healed")
        return found
    best: dict[tuple[str, ...], list[LayerPlan]] = {}
    for layers in [found.layers, *found.others]:
        labels = tuple(layer.label for layer in layers)
        loss = found.losses.get(labels, predicted_loss(sensitivity, layers, config.weights))
        if budget.met(layers) and (config.max_loss is None or (loss is not None and loss <= config.max_loss)):
            best.setdefault(labels, layers)
    ranked = list(best)[: config.pilots]
    if len(ranked) < 2:
        say("pilots: only one plan at the budget is known, so there is nothing to compare")
        return found
    how = pilot.digest(folder, config)
    windows = sorted({layer.window for labels in ranked for layer in best[labels] if layer.window is not None})
    keys = [kept.key("pilot", how, config.weights, windows, labels) for labels in ranked]
    for number, (key, labels) in enumerate(zip(keys, ranked, strict=True), 1):
        if key not in kept:
            say(f"pilot {number} of {len(ranked)}")
            kept[key] = pilot(folder, best[labels], config, windows)
    losses = [kept[key] for key in keys]
    for labels, loss in zip(ranked, losses, strict=True):
        say(f"pilot: {' '.join(short(label) for label in labels)} ends at {loss:.4f}")
    return dataclasses.replace(found, layers=best[ranked[losses.index(min(losses))]])


def _plan(sensitivity: Sensitivity, found: Found, budget: Budget, config: Config, made_from: dict[str, str]) -> Plan:
    layers = [
        layer if layer.reason else dataclasses.replace(layer, reason=reason(layer, own, config.weights))
        for layer, own in zip(found.layers, sensitivity.layers, strict=True)
    ]
    measured: dict[str, Any] = {}
    if found.cost is not None:
        measured["cost"] = found.cost.model_dump()
    loss = found.losses.get(tuple(layer.label for layer in layers))
    if loss is not None:
        measured["loss"] = round(loss, 6)
    return Plan(
        layers=layers,
        model=sensitivity.model,
        planner=config.model_dump(mode="json", exclude_none=True),
        predicted=predict(sensitivity, layers, budget, config.weights),
        measured=measured,
        front=_front(sensitivity, found, budget, config.weights),
        inputs=made_from,
        provenance=provenance(layers_digest=layers_digest(layers)),
    )


def _front(sensitivity: Sensitivity, found: Found, budget: Budget, weights: dict[str, float]) -> list[FrontPoint]:
    """Of all plans at hand those that no other beats, and the chosen one; measured losses where there are some."""
    points: dict[tuple[str, ...], FrontPoint] = {}
    known = [{c.plan.label: candidate_loss(c, weights) for c in own} | {KEEP.label: 0.0} for own in sensitivity.layers]
    for layers in [found.layers, *found.others]:
        labels = tuple(layer.label for layer in layers)
        loss = found.losses.get(labels)
        measured = loss is not None
        if loss is None and all(label in own for label, own in zip(labels, known, strict=True)):
            loss = sum(own[label] for label, own in zip(labels, known, strict=True))
        if loss is not None and (measured or not found.losses) and labels not in points:
            points[labels] = FrontPoint(
                loss=round(loss, 6), measured=measured, kv_share=round(budget.kv_share(layers), 6), layers=list(labels),
                chosen=not points,
            )  # fmt: skip
    best: list[FrontPoint] = []
    for point in sorted(points.values(), key=lambda p: (p.kv_share, p.loss)):
        if not best or point.loss < min(p.loss for p in best) or point.chosen:
            best.append(point)
    kept = thinned(best)
    return [point for point in best if point.chosen or point in kept]


def layers_digest(layers: list[LayerPlan]) -> str:
    return text_digest([layer.entry() for layer in layers])


def edited(plan: Plan) -> bool:
    """Whether a person wrote the layers, or changed them since they were planned."""
    return plan.provenance.get("layers_digest") != layers_digest(plan.layers)


def predict(
    sensitivity: Sensitivity, layers: list[LayerPlan], budget: Budget, weights: dict[str, float]
) -> dict[str, Any]:
    """What a plan should cost: loss if damages added up, KV cache, and how far back it can look."""
    base, hybrid = budget.base_bytes, budget.kv_bytes(layers)
    loss = predicted_loss(sensitivity, layers, weights)
    found = {
        "loss": None if loss is None else round(loss, 6),
        "context": budget.context,
        "engine": "vllm" if budget.on_vllm else "transformers",
        "kv_bytes": {"base": base, "hybrid": hybrid},
        "kv_share": round(hybrid / base, 4) if base else None,
        "receptive_field": sensitivity.model.receptive_field(layers),
    }
    if budget.throughput is not None:
        found["throughput"] = round(budget.speedup(layers), 3)
    return found
