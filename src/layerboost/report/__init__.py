"""report: one self-contained HTML file, a view of what a run's artifacts say."""

import math
from pathlib import Path
from typing import Any

import jinja2

from layerboost.artifacts import (
    Bench,
    Evaluation,
    Healing,
    Plan,
    Result,
    Sensitivity,
    load,
    write_text,
)
from layerboost.errors import UsageError
from layerboost.report.figures import healing_figure, sensitivity_figure

_PARTS: dict[str, Any] = {
    "result": (Result, "result.json"),
    "sensitivity": (Sensitivity, "sensitivity.json"),
    "plan": (Plan, "plan.json"),
    "healing": (Healing, "healed/healing.json"),
    "evaluation": (Evaluation, "evaluation.json"),
    "bench": (Bench, "bench.json"),
}


def run(folder: Path, *, out: Path | None = None) -> Path:
    """Write `report.html` of a run folder, and return its path.

    Raises:
        UsageError: the folder is not that of a finished run.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; name the run folder that `layerboost run` wrote")
    missing = [name for _, name in _PARTS.values() if not (folder / name).is_file()]
    if missing:
        raise UsageError(f"{folder} is not a finished run: {missing[0]} is missing; finish it with `layerboost run`")
    parts = {name: load(kind, folder / file, UsageError) for name, (kind, file) in _PARTS.items()}
    path = out or folder / "report.html"
    write_text(path, render(**parts))
    return path


def render(
    result: Result, sensitivity: Sensitivity, plan: Plan, healing: Healing, evaluation: Evaluation, bench: Bench
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("layerboost.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["bytes"] = readable_bytes
    return environment.get_template("report.html.jinja").render(
        result=result, sensitivity=sensitivity, plan=plan, healing=healing, evaluation=evaluation, bench=bench,
        sensitivity_svg=sensitivity_figure(sensitivity), healing_svg=healing_figure(healing),
    )  # fmt: skip


def readable_bytes(count: float) -> str:
    if count < 1_000:
        return f"{count:,.0f} B"
    power = min(3, int(math.log(count, 1_000)))
    return f"{count / 1_000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}"
