"""The spine: the verbs in order, each skipped while what it was made from is unchanged."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from layerboost import analyze, bench, convert, evaluate, heal, plan
from layerboost import report as report_verb
from layerboost.analyze import looking
from layerboost.artifacts import (
    HEALING,
    Bench,
    Evaluation,
    Plan,
    Quality,
    Result,
    Sensitivity,
    check_output_folder,
    check_space,
    load,
    lock,
    read_json,
    recorded_inputs,
    save,
    write_text,
)
from layerboost.cost.device import find_device
from layerboost.data.corpus import open_corpus
from layerboost.data.samples import sequence_length
from layerboost.data.sources import check_sources
from layerboost.errors import CheckpointError, UsageError
from layerboost.estimate import estimate
from layerboost.heal.checkpoint import clear_steps
from layerboost.model.loading import describe, find_model, is_hybrid, model_record, read_config
from layerboost.passes import ranks
from layerboost.pilot import Pilots
from layerboost.plan.budget import Budget
from layerboost.progress import say
from layerboost.provenance import command, provenance
from layerboost.recipe import Recipe, load_recipe
from layerboost.tasks import load_tasks
from layerboost.vllm import require_vllm


@dataclass(frozen=True)
class Stage:
    """One verb of a run.

    Attributes:
        inputs: digests of what its artifact is made from; only known once the stages before it are current.
        make: writes the artifact to a path.
    """

    verb: str
    path: Path
    inputs: Callable[[], dict[str, str]]
    make: Callable[[Path], Any]

    def is_current(self) -> bool:
        if self.verb == "plan" and self.path.exists() and plan.edited(load(Plan, self.path)):
            say(f"plan: {self.path} was edited by hand and is followed; remove it to plan again")
            return True
        found = recorded_inputs(self.path)
        return found is not None and found == self.inputs()


def stages(model: str | Path, folder: Path, recipe: Recipe, out: Path) -> list[Stage]:
    """The verbs in order.

    Args:
        model: as the user names it; `folder` is where it lies.
    """
    record = describe(model, folder, read_config(folder))
    sensitivity, planned, hybrid, healed = (out / n for n in ("sensitivity.json", "plan.json", "hybrid", "healed"))
    analyzing, planning = recipe.section(analyze.Config, "analyze"), recipe.section(plan.Config, "plan")
    healing, evaluating = recipe.section(heal.Config, "heal"), recipe.section(evaluate.Config, "evaluate")
    benching = recipe.section(bench.Config, "bench")
    pilots = Pilots(healing, out / ".pilot")
    return [
        Stage(
            "analyze", sensitivity, lambda: analyze.inputs(record, folder, analyzing),
            lambda path: analyze.run(model, analyzing, out=path),
        ),
        Stage(
            "plan", planned, lambda: plan.inputs(load(Sensitivity, sensitivity), planning, folder, pilots),
            lambda path: plan.run(sensitivity, planning, model=model, out=path, pilot=pilots),
        ),
        Stage(
            "convert", hybrid, lambda: convert.inputs(record, folder, load(Plan, planned)),
            lambda path: convert.run(model, planned, out=path),
        ),
        Stage(
            "heal", healed, lambda: heal.inputs(hybrid, folder, healing),
            lambda path: heal.run(hybrid, model, healing, out=path, steps_folder=out / "heal"),
        ),
        Stage(
            "evaluate", out / "evaluation.json", lambda: evaluate.inputs(healed, folder, evaluating),
            lambda path: evaluate.run(healed, model, evaluating, out=path),
        ),
        Stage(
            "bench", out / "bench.json", lambda: bench.inputs(healed, folder, benching),
            lambda path: bench.run(healed, model, benching, out=path),
        ),
    ]  # fmt: skip


def run(model: str | Path, recipe: Recipe, *, out: Path) -> Result:
    """A checkpoint in; a healed hybrid in `out/healed`, `result.json` and `report.html` out.

    The same call after a kill goes on where it was, and what is current is not done again.

    Raises:
        LayerBoostError: as the verbs do.
        UsageError: several processes.
        EnvironmentTrouble: another process writes the same run folder, or the disk lacks space.
    """
    check_place(out)
    if ranks()[1] > 1 or recipe.heal.shard:
        raise UsageError(
            "a run is one process; start analyze and heal by themselves with torchrun, and leave heal.shard out here"
        )
    folder = find_model(model)
    config = read_config(folder)
    check_settings(config, recipe)
    if recipe.evaluate.tasks and "evaluate" in still_to_do(model, recipe, out=out):
        load_tasks(recipe.evaluate.tasks, recipe.evaluate.task_folder)
    if recipe.bench.engine == "vllm":
        require_vllm()
    check_space(out, estimate(config, recipe).disk_bytes - _bytes_in(out))
    with lock(out):
        _keep(recipe, out / "recipe.yaml")
        for stage in stages(model, folder, recipe, out):
            if stage.is_current():
                say(f"{stage.verb}: {stage.path} is current")
                if stage.verb == "heal":  # killed before it could
                    clear_steps(out / "heal")
                continue
            say(f"{stage.verb}: writing {stage.path}")
            started = time.monotonic()
            stage.make(stage.path)
            say(f"{stage.verb}: done in {time.monotonic() - started:.0f} s")
        found = result(out)
        save(found, out / "result.json")
        report_verb.run(out)
    return found


def _keep(recipe: Recipe, path: Path) -> None:
    """Beside the results; a file that says the same already is somebody's own, with comments."""
    wanted = recipe.resolved()
    with contextlib.suppress(UsageError):
        if load_recipe(path).resolved() == wanted:
            return
    write_text(path, yaml.safe_dump(wanted, sort_keys=False))


def check_place(out: Path) -> None:
    """Raises UsageError where a run cannot be."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    if (out / "config.json").exists():
        raise UsageError(f"{out} is a checkpoint; name another --out")
    for name in ("hybrid", "healed"):
        check_output_folder(out / name)


def check_settings(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Raises for slips in the settings of any stage, which would else be found hours later; neither weights nor
    tokenizer are looked at."""
    if is_hybrid(config):
        raise CheckpointError("the model is a hybrid already; name the original model")
    analyzing, planning = recipe.section(analyze.Config, "analyze"), recipe.section(plan.Config, "plan")
    healing, evaluating = recipe.section(heal.Config, "heal"), recipe.section(evaluate.Config, "evaluate")
    benching = recipe.section(bench.Config, "bench")
    context = config.max_position_embeddings
    windows = analyze.windows_of(analyzing, context)
    looking.lengths(analyzing, windows, context)
    sequence_length(planning.measuring, context)
    evaluate.lengths(evaluating, context, looking.all_windows(analyzing, windows))
    for reading in (analyzing, planning, healing, evaluating):  # what is not there, or is no text, is said
        open_corpus(reading.text)
    check_sources(healing.data or [])
    _check_planning(config, analyzing, plan.settled(planning, planning.planner or "greedy"))
    if planning.throughput is not None and planning.device_profile != "here":
        find_device(planning.device_profile)
    heal.check(healing, config)
    bench.check(benching, context)


def _check_planning(config: PreTrainedConfig, analyzing: analyze.Config, planning: plan.Config) -> None:
    """Against what will be measured."""
    record = model_record(config, "", "")
    Budget(record, planning, config)
    candidates = analyze.candidates_for(record, analyze.windows_of(analyzing, record.context), analyzing.mixers)
    analyze.check_weights(analyzing, [*analyzing.weights, *planning.weights])
    if planning.planner == "tiers":
        analyze.check_weights(analyzing, [planning.tiers.score], "tiers.score")
    if planning.planner in ("greedy", "gates"):
        plan.measuring_lengths(planning.measuring, candidates, record.context)


def still_to_do(model: str | Path, recipe: Recipe, *, out: Path) -> list[str]:
    """Verbs that a run would do now: the first that is not current, and what follows from it. Writes nothing."""
    verbs = stages(model, find_model(model), recipe, out)
    first = next((n for n, stage in enumerate(verbs) if not stage.is_current()), len(verbs))
    return [stage.verb for stage in verbs[first:]]


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def result(out: Path) -> Result:
    """Put the truth about a run together from its artifacts."""
    sensitivity = load(Sensitivity, out / "sensitivity.json")
    chosen = load(Plan, out / "plan.json")
    evaluation, benched = load(Evaluation, out / "evaluation.json"), load(Bench, out / "bench.json")
    qualities = {name: _plain(quality) for name, quality in evaluation.models.items()}
    return Result(
        model={
            "name": sensitivity.model.name,
            "num_layers": sensitivity.model.num_layers,
            "parameters": benched.parameters["base"],
        },
        plan={
            "layers": [layer.mixer for layer in chosen.layers],
            "windows": [layer.window for layer in chosen.layers],
        },
        quality=qualities | {"recovered": recovered(evaluation.models)},
        cost={
            "context": benched.context,
            "kv_bytes_per_token": benched.kv_bytes_per_token,
            "parameters": benched.parameters,
        },
        speed=benched.speed,
        tasks=_task_values(evaluation),
        provenance=provenance(
            command=command(),
            model_digest=sensitivity.model.digest,
            intervals={name: quality.model_dump(mode="json") for name, quality in evaluation.models.items()},
            healing_tokens=read_json(out / "healed" / HEALING)["tokens"],
            bench=benched.settings,
        ),
    )


def _plain(quality: Quality) -> dict[str, Any]:
    return {
        "nll": quality.nll.mean,
        "perplexity": quality.perplexity,
        "kl": quality.kl.mean,
        "recall": {probe: found.mean for probe, found in quality.recall.items()},
    }


def _task_values(evaluation: Evaluation) -> dict[str, dict[str, dict[str, float | None]]]:
    """Per model, task and metric."""
    return {
        model: {task: {metric: score.value for metric, score in found.items()} for task, found in tasks.items()}
        for model, tasks in evaluation.tasks.items()
    }


def recovered(models: dict[str, Quality]) -> dict[str, float | None]:
    """Share of the gap to the base that healing closed; None where conversion opened none."""
    found: dict[str, float | None] = {}
    for metric in ("kl", "nll"):
        base, converted, healed = (getattr(models[name], metric).mean for name in ("base", "converted", "healed"))
        gap = converted - base
        found[metric] = None if gap <= 0 else 1 - (healed - base) / gap
    return found
