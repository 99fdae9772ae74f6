"""The spine: the verbs in order, each skipped while what it was made from is unchanged."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from layerboost import analyze, bench, convert, evaluate, heal, plan
from layerboost import report as report_verb
from layerboost.artifacts import (
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
from layerboost.errors import UsageError
from layerboost.estimate import estimate
from layerboost.model.loading import describe, find_model, read_config
from layerboost.progress import say
from layerboost.provenance import command, provenance
from layerboost.recipe import Recipe


def run(model: str | Path, recipe: Recipe, *, out: Path) -> Result:
    """A checkpoint in; a healed hybrid in `out/healed`, `result.json` and `report.html` out.

    The same call after a kill goes on where it was, and what is current is not done again.

    Raises:
        LayerBoostError: as the verbs do.
        EnvironmentTrouble: another process writes the same run folder, or the disk lacks space.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder")
    for name in ("hybrid", "healed"):
        check_output_folder(out / name)
    folder = find_model(model)
    record = describe(model, folder, read_config(folder))
    check_space(out, estimate(read_config(folder), recipe).disk_bytes - _bytes_in(out))
    with lock(out):
        write_text(out / "recipe.yaml", yaml.safe_dump(recipe.resolved(), sort_keys=False))
        analyzed = recipe.section(analyze.Config, "analyze")
        _stage(
            "analyze", out / "sensitivity.json", analyze.inputs(record, folder, analyzed),
            lambda path: analyze.run(model, analyzed, out=path),
        )  # fmt: skip
        sensitivity = load(Sensitivity, out / "sensitivity.json")
        planned = recipe.section(plan.Config, "plan")
        chosen = _plan(out / "plan.json", sensitivity, planned)
        _stage(
            "convert", out / "hybrid", convert.inputs(record, folder, chosen),
            lambda path: convert.run(model, chosen, out=path),
        )  # fmt: skip
        healing = recipe.section(heal.Config, "heal")
        _stage(
            "heal", out / "healed", heal.inputs(out / "hybrid", folder, healing),
            lambda path: heal.run(out / "hybrid", model, healing, out=path, steps_folder=out / "heal"),
        )  # fmt: skip
        evaluated = recipe.section(evaluate.Config, "evaluate")
        _stage(
            "evaluate", out / "evaluation.json", evaluate.inputs(out / "healed", folder, evaluated),
            lambda path: evaluate.run(out / "healed", model, evaluated, out=path),
        )  # fmt: skip
        benched = recipe.section(bench.Config, "bench")
        _stage(
            "bench", out / "bench.json", bench.inputs(out / "healed", folder, benched),
            lambda path: bench.run(out / "healed", model, benched, out=path),
        )  # fmt: skip
        found = result(out)
        save(found, out / "result.json")
        report_verb.run(out)
    return found


def _plan(path: Path, sensitivity: Sensitivity, config: plan.Config) -> Plan:
    """The plan that stands there if a person had a hand in it, else one that is current."""
    if path.exists():
        found = load(Plan, path)
        if plan.edited(found):
            say(f"plan: {path} was edited by hand and is followed; remove it to plan again")
            return found
    _stage("plan", path, plan.inputs(sensitivity, config), lambda to: plan.run(sensitivity, config, out=to))
    return load(Plan, path)


def _stage(name: str, path: Path, inputs: dict[str, str], make: Callable[[Path], Any]) -> None:
    if recorded_inputs(path) == inputs:
        say(f"{name}: {path} is current")
        return
    say(f"{name}: writing {path}")
    started = time.monotonic()
    make(path)
    say(f"{name}: done in {time.monotonic() - started:.0f} s")


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
        provenance=provenance(
            command=command(),
            model_digest=sensitivity.model.digest,
            intervals={name: quality.model_dump(mode="json") for name, quality in evaluation.models.items()},
            healing_tokens=read_json(out / "healed" / "healing.json")["tokens"],
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


def recovered(models: dict[str, Quality]) -> dict[str, float | None]:
    """Share of the gap to the base that healing closed; None where conversion opened none."""
    found: dict[str, float | None] = {}
    for metric in ("kl", "nll"):
        base, converted, healed = (getattr(models[name], metric).mean for name in ("base", "converted", "healed"))
        gap = converted - base
        found[metric] = None if gap <= 0 else 1 - (healed - base) / gap
    return found
