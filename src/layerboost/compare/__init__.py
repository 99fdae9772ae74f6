"""compare: the neutral benchmark. Same models, budget and healing, every way of choosing layers and replacements.

    job.yaml -> OUT/MODEL/SEED/sensitivity.json, plans/NAME.json, trials/DIGEST.json -> OUT/comparison.json, .md, .png

Every file is a step that is not done again; ways that choose the same plan share one trial.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field, field_validator

from layerboost import analyze, convert, evaluate, heal, plan
from layerboost.analyze import Config as AnalyzeConfig
from layerboost.artifacts import (
    Comparison,
    Entry,
    Estimate,
    ModelRecord,
    Plan,
    Record,
    Sensitivity,
    Share,
    Trial,
    check_output_file,
    load,
    lock,
    recorded_inputs,
    save,
    text_digest,
    validate,
    write_text,
)
from layerboost.compare.tables import figures, markdown
from layerboost.damage import DEFAULT_WEIGHTS, Shares, Weights, damages
from layerboost.data.corpus import open_corpus
from layerboost.data.probes import PROBES
from layerboost.data.samples import Seed, samples
from layerboost.errors import PlanError, UsageError
from layerboost.heal import Config as HealConfig
from layerboost.layer_plan import LayerPlan
from layerboost.model.loading import (
    describe,
    find_model,
    load_model,
    load_original,
    load_tokenizer,
    pick_device,
    read_config,
)
from layerboost.pilot import Pilots
from layerboost.plan import Measuring
from layerboost.progress import say
from layerboost.provenance import provenance
from layerboost.scoring import batch_rows

DEFAULT = "greedy"
# every way of choosing layers: what `plan` is told
SELECTORS: dict[str, dict[str, Any]] = {
    "greedy": {"planner": "greedy"},
    "greedy+pilots": {"planner": "greedy", "pilots": 3},
    "milp": {"planner": "milp"},
    "gates": {"planner": "gates"},
    **{
        f"tiers {score}": {"planner": "tiers", "tiers": {"score": score}}
        for score in (
            "text_kl",
            "recall_kl",
            "text_nll",
            "benchmarks",
            "cosine",
            "taylor",
            "reconstruction",
            "attention_mass",
        )
    },
    "uniform": {"planner": "uniform"},
    "periodic": {"planner": "periodic"},
    "random": {"planner": "random"},
}
_WHEN = ("before", "after")
_TOKENS = 100_000  # of each of many healings, where no others are asked for
_PILOT_SHARE = 5  # a pilot has a fifth of the tokens of the healing
# settings of other verbs that a job has its own for
_TOLD = {
    "analyze.seed": "seeds", "analyze.length": "length", "analyze.weights": "weights", "analyze.mixers": "replacements",
    "plan.length": "length", "heal.seed": "seeds",
}  # fmt: skip
_PAPER = "tiers benchmarks"  # the paper's own score needs `analyze.tasks`
# what may take the place of attention; windows are filled in
OPERATORS: dict[str, dict[str, Any]] = {
    "window": {"mixer": "sliding_attention", "window": 0},
    "window+sink": {"mixer": "sliding_attention", "window": 0, "sink": True},
    "lolcats": {"mixer": "linear_attention", "variant": "lolcats", "window": 0},
    "linear": {"mixer": "linear_attention", "variant": "linear"},
    "performer": {"mixer": "linear_attention", "variant": "performer"},
    "state": {"mixer": "linear_attention", "variant": "gla"},
    "none": {"mixer": "no_attention"},
}


class Job(Record):
    """What a comparison is told, in one YAML file.

    Attributes:
        models: folders or hub ids.
        seeds: of the data that is analysed and healed on, of random plans and of new parameters.
        kv_reduction: the budget of every plan, for sequences of `length` tokens, which is also how long the data is.
        selectors, replacements: which ones to compare. A replacement is put into every layer (`uniform`), around every
            n-th layer (`periodic`), and where its own measured damage is least (`aware`), at the same budget.
        replacement_window: of replacements that have one and are not put into every layer.
        weights: of the loss.
        texts, answers: held-out sequences of text and of each probe.
    """

    models: list[str] = Field(min_length=1)
    seeds: list[Seed] = Field([0, 1, 2], min_length=1)
    kv_reduction: Share = 0.6
    length: int = Field(256, ge=64)
    selectors: list[str] = Field([name for name in SELECTORS if name != _PAPER])
    replacements: list[str] = Field(list(OPERATORS))
    replacement_window: int = Field(16, ge=1)
    weights: Weights = DEFAULT_WEIGHTS
    texts: int = Field(64, ge=2)
    answers: int = Field(100, ge=2)
    analyze: AnalyzeConfig = AnalyzeConfig()
    heal: HealConfig = HealConfig(tokens=_TOKENS)
    plan: Measuring = Measuring()

    @property
    def distance(self) -> int:
        """Fewest tokens between an answer and its source."""
        return self.length // 2

    @field_validator("heal", mode="before")
    @classmethod
    def _few_tokens(cls, raw: Any) -> Any:
        return {"tokens": _TOKENS, **raw} if isinstance(raw, dict) else raw


def load_job(path: Path) -> Job:
    """Raises UsageError if the file is not a job."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as trouble:
        raise UsageError(f"job {path} cannot be read: {' '.join(str(trouble).split())}; name a YAML file") from None
    if not isinstance(raw, dict):
        raise UsageError(f"job {path} must hold keys and values, found {type(raw).__name__}")
    job = validate(Job, raw, f"job {path}", UsageError)
    for key, known in (("selectors", SELECTORS), ("replacements", OPERATORS)):
        unknown = [name for name in getattr(job, key) if name not in known]
        if unknown:
            raise UsageError(f"job {path}: {key}: {unknown[0]!r} is not one of {', '.join(known)}")
    names = [Path(model).name for model in job.models]
    if len(set(names)) < len(names):
        raise UsageError(f"job {path}: models: two are called {max(names, key=names.count)}, as their folders would be")
    wide = [w for w in (*(job.analyze.windows or []), job.replacement_window) if w >= job.distance]
    if wide:
        raise UsageError(
            f"job {path}: a window of {wide[0]} reaches answers of {job.length} tokens, which stand {job.distance} "
            f"behind their source; choose narrower windows, or a length of at least {2 * (wide[0] + 1)}"
        )
    unknown = [metric for metric in job.weights if metric not in plan.MEASURED]
    if unknown:
        raise UsageError(f"job {path}: weights: {unknown[0]!r} is not one of {', '.join(plan.MEASURED)}")
    for key, of in _TOLD.items():
        section, _, setting = key.partition(".")
        if setting in getattr(job, section).model_fields_set:
            raise UsageError(f"job {path}: {key} is told by {of}; leave it out")
    if DEFAULT not in job.selectors:
        raise UsageError(f"job {path}: selectors must have {DEFAULT}, which the others are compared with")
    return job


def run(job: Job, *, out: Path) -> Comparison:
    """All models and seeds. The same call after a kill goes on where it was.

    Raises:
        LayerBoostError: as the verbs do.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    check_output_file(out / "comparison.json", Comparison)
    for model in job.models:  # what is missing is told now, and not after hours with the ones before it
        read_config(find_model(model))
    with lock(out):
        entries: list[Entry] = []
        for model in job.models:
            for seed in job.seeds:
                entries += Bout(job, model, seed, out / Path(model).name / str(seed)).run()
                comparison = Comparison(
                    default=DEFAULT, entries=entries,
                    provenance=provenance(job=job.model_dump(mode="json"), finished=len(entries)),
                )  # fmt: skip
                save(comparison, out / "comparison.json")
                write_text(out / "comparison.md", markdown(comparison))
        figures(comparison, out / "comparison.png")
    return comparison


@dataclass
class Bout:
    """One model under one seed."""

    job: Job
    model: str
    seed: int
    folder: Path

    @cached_property
    def base(self) -> Path:
        return find_model(self.model)

    @cached_property
    def record(self) -> ModelRecord:
        return describe(self.model, self.base, read_config(self.base))

    @cached_property
    def windows(self) -> list[int]:
        """Those that selectors may use; none of the usual ones that reaches an answer."""
        windows = analyze.windows_of(self.job.analyze, self.record.context)
        return [window for window in windows if window < self.job.distance]

    @cached_property
    def usual(self) -> set[str]:
        """Labels of every selector's candidates; replacements are measured beside them."""
        return {plan.label for own in analyze.candidates_for(self.record, self.windows) for plan in own}

    def run(self) -> list[Entry]:
        say(f"compare: {self.model}, seed {self.seed}")
        trials: dict[str, Trial] = {}
        entries = []
        for name, config, kept in self._ways():
            try:
                chosen, cost = self._plan(name, config, kept)
                digest, trial = self._trial(chosen)
            except PlanError as trouble:
                verdict = {"after": f"no plan: {trouble}"}
                entries.append(Entry(model=self.model, seed=self.seed, name=name, trial=None, verdict=verdict))
                continue
            trials[name] = trial
            entries.append(
                Entry(
                    model=self.model, seed=self.seed, name=name, trial=digest, plan=trial.layers,
                    kv_share=trial.kv_share, cost=cost,
                    loss={when: weighted_estimate(getattr(trial, when), self.job.weights) for when in _WHEN},
                    recall_lost={when: _recall_lost(getattr(trial, when)) for when in _WHEN},
                )
            )  # fmt: skip
        return [self._judged(entry, trials) for entry in entries]

    def _judged(self, entry: Entry, trials: dict[str, Trial]) -> Entry:
        if entry.name not in trials or entry.name == DEFAULT or DEFAULT not in trials:
            return entry
        ours, theirs = trials[DEFAULT], trials[entry.name]
        against: dict[str, Estimate] = {}
        verdict: dict[str, str] = {}
        for when in _WHEN:
            a, b = getattr(ours, when), getattr(theirs, when)
            both = {metric: (np.array(a[metric]) - np.array(b[metric])).tolist() for metric in a}
            for what, found in (
                (when, weighted_estimate(both, self.job.weights)),
                (f"recall {when}", _recall_lost(both)),
            ):
                against[what] = found
                verdict[what] = "wins" if found.high < 0 else "loses" if found.low > 0 else "ties"
                if ours.layers == theirs.layers:
                    verdict[what] = "same plan"
        return entry.model_copy(update={"against": against, "verdict": verdict})

    @cached_property
    def sensitivity(self) -> Sensitivity:
        mixers = [self._mixer(name, self.job.replacement_window) for name in self.job.replacements]
        config = self.job.analyze.model_copy(
            update={
                "seed": self.seed, "length": self.job.length, "weights": self.job.weights, "windows": self.windows,
                "mixers": [mixer for mixer in mixers if mixer.label not in self.usual],
            }
        )  # fmt: skip
        path = self.folder / "sensitivity.json"
        if recorded_inputs(path) != analyze.inputs(self.record, self.base, config):
            path.parent.mkdir(parents=True, exist_ok=True)
            analyze.run(self.model, config, out=path)
        return load(Sensitivity, path)

    def _mixer(self, name: str, window: int) -> LayerPlan:
        entry = OPERATORS[name]
        return LayerPlan(**(entry | {"window": window} if "window" in entry else entry))

    def _ways(self) -> Iterator[tuple[str, dict[str, Any], set[str]]]:
        """Name, what `plan` is told, and the labels of the candidates it may use."""
        for name in self.job.selectors:
            yield name, SELECTORS[name], self.usual
        for name in self.job.replacements:
            mixer = self._mixer(name, self.job.replacement_window)
            wide = mixer if mixer.window is None else self._mixer(name, self._window_at_budget(mixer))
            yield f"uniform {name}", {"planner": "uniform", "mixer": wide.entry()}, self.usual
            yield f"periodic {name}", {"planner": "periodic", "mixer": mixer.entry()}, self.usual
            yield f"aware {name}", {"planner": "milp"}, {mixer.label}

    def _window_at_budget(self, mixer: LayerPlan) -> int:
        """The widest window with which every layer together stays within the budget, and that reaches no answer."""
        count = self.record.num_layers
        allowed = (1 - self.job.kv_reduction) * self.record.kv_bytes(
            [LayerPlan("full_attention")] * count, self.job.length
        )
        fitting = [
            w for w in range(1, self.job.distance)
            if self.record.kv_bytes([LayerPlan(**(mixer.entry() | {"window": w}))] * count, self.job.length) <= allowed
        ]  # fmt: skip
        return max(fitting, default=1)

    def _plan(self, name: str, told: dict[str, Any], kept: set[str]) -> tuple[Plan, float]:
        measures = told["planner"] in ("greedy", "gates")
        measuring = self.job.plan.model_dump() | {"length": self.job.length} if measures else {}
        config = validate(
            plan.Config,
            told | {
                "kv_reduction": self.job.kv_reduction, "context": self.job.length, "seed": self.seed,
                "weights": self.job.weights, "measuring": measuring,
                "pilot_tokens": self._pilot_tokens, "text": self.job.analyze.text, "device": self.job.analyze.device,
            },
            f"selector {name}", UsageError,
        )  # fmt: skip
        allowed = self.sensitivity.model_copy(
            update={"layers": [[c for c in own if c.plan.label in kept] for own in self.sensitivity.layers]}
        )
        path = self.folder / "plans" / f"{name.replace(' ', '-').replace('+', '-')}.json"
        pilots = Pilots(self.job.heal.model_copy(update={"seed": self.seed}), self.folder / ".pilot")
        wanted = plan.inputs(allowed, config, self.base, pilots)
        if recorded_inputs(path) != wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            plan.run(allowed, config, model=self.model, out=path, pilot=pilots)
        found = load(Plan, path)
        return found, self._cost(told, found, allowed)

    @property
    def _pilot_tokens(self) -> int:
        return max(self.job.heal.length or heal.DEFAULT_LENGTH, self.job.heal.tokens // _PILOT_SHARE)

    def _cost(self, told: dict[str, Any], found: Plan, allowed: Sensitivity) -> float:
        """Forward passes over the analysed data that the choice took."""
        if told["planner"] in ("uniform", "periodic", "random"):
            return 0.0
        score = told.get("tiers", {}).get("score")
        measured_by = "tasks" if score == analyze.BENCHMARKS else score
        if measured_by in self.sensitivity.costs:
            return self.sensitivity.costs[measured_by].forwards
        layers = len(allowed.layers)
        candidates = [[c for c in own if score is None or c.mixer == "no_attention"] for own in allowed.layers]
        analysed = 1 + sum(len(own) * (layers - i) / layers for i, own in enumerate(candidates))
        cost = found.measured.get("cost")
        tokens = self.sensitivity.costs["measured"].tokens
        own = (self.job.plan.texts + len(PROBES) * self.job.plan.answers) * self.job.length
        more = cost["forwards"] * own / tokens if cost else 0.0
        more += 4 * told.get("pilots", 0) * self._pilot_tokens / tokens  # teacher, student, and a backward pass is two
        return round(more + (0.0 if told["planner"] == "gates" else analysed), 2)

    def _trial(self, chosen: Plan) -> tuple[str, Trial]:
        labels = [layer.label for layer in chosen.layers]
        healing = self.job.heal.model_copy(update={"seed": self.seed})
        wanted = {
            "model": self.record.digest, "layers": text_digest(labels),
            "settings": text_digest(
                {"heal": heal.data_and_settings(self.base, healing), "texts": self.job.texts,
                 "answers": self.job.answers, "length": self.job.length}
            ),
        }  # fmt: skip
        digest = text_digest(labels)[:16]
        path = self.folder / "trials" / f"{digest}.json"
        if recorded_inputs(path) != wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            # what is there already was made with these settings, or is not looked at
            work = path.with_name(f"{digest}-{text_digest(wanted)[:8]}.work")
            for other in {*path.parent.glob(f"{digest}*.work")} - {work}:
                shutil.rmtree(other)
            save(self._healed(chosen, healing, wanted, work), path)
        return digest, load(Trial, path)

    def _healed(self, chosen: Plan, healing: HealConfig, wanted: dict[str, str], work: Path) -> Trial:
        started = time.monotonic()
        work.mkdir(exist_ok=True)
        save(chosen, work / "plan.json")
        hybrid, healed = work / "hybrid", work / "healed"
        if not healed.exists():
            if not hybrid.exists():
                convert.run(self.model, work / "plan.json", out=hybrid)
            heal.run(hybrid, self.model, healing, out=healed)
        before, after = self._scores(hybrid, healed)
        shutil.rmtree(work)
        return Trial(
            layers=[layer.label for layer in chosen.layers],
            kv_share=self.record.kv_bytes(chosen.layers, self.job.length)
            / self.record.kv_bytes([LayerPlan("full_attention")] * self.record.num_layers, self.job.length),
            before=before, after=after, healing_tokens=healing.tokens, inputs=wanted,
            provenance=provenance(seconds=round(time.monotonic() - started, 1)),
        )  # fmt: skip

    def _scores(self, hybrid: Path, healed: Path) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        device = pick_device(self.job.heal.device)
        dtype = torch.float32 if device == "cpu" else None
        base = load_original(self.base, dtype=dtype, device=device)
        config = base.config
        data = samples(
            open_corpus(self.job.heal.text), load_tokenizer(self.base), config.vocab_size, split="held_out",
            texts=self.job.texts, answers=self.job.answers, length=self.job.length,
            distance=self.job.distance, seed=0,
        )  # fmt: skip
        students = {"base": base} | {
            name: load_model(folder, dtype=dtype, device=device)
            for name, folder in zip(_WHEN, (hybrid, healed), strict=True)
        }
        rows = batch_rows(self.job.length, config.vocab_size, config.hidden_size, 1)
        scores = evaluate.measure(base, students, data, rows)
        found = [damages(scores["base"], scores[when]) for when in _WHEN]
        before, after = ({m: np.round(values, 6).tolist() for m, values in one.items()} for one in found)
        return before, after


def weighted_estimate(metrics: dict[str, list[float]], weights: dict[str, float], resamples: int = 1_000) -> Estimate:
    """The weighted sum of metrics' means, with an interval from resampling sequences."""
    shares = Shares(resamples)
    mean, drawn, count = 0.0, np.zeros(resamples), 0
    for metric, weight in weights.items():
        values = np.array(metrics[metric])
        mean += weight * float(values.mean())
        drawn += weight * (values @ shares(metric, len(values)))
        count += len(values)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(mean=mean, low=float(low), high=float(high), count=count)


def _recall_lost(metrics: dict[str, list[float]]) -> Estimate:
    return weighted_estimate(metrics, {probe: 1 / len(PROBES) for probe in PROBES})
