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
from layerboost.report.figures import healing_figure, sensitivity_figure, serving_figure

_PARTS: dict[str, Any] = {
    "result": (Result, "result.json"),
    "sensitivity": (Sensitivity, "sensitivity.json"),
    "plan": (Plan, "plan.json"),
    "healing": (Healing, "healed/healing.json"),
    "evaluation": (Evaluation, "evaluation.json"),
    "bench": (Bench, "bench.json"),
}


def run(source: Path, *, out: Path | None = None) -> Path:
    """Write the page of a run folder, `report.html`, or of a bench of vLLM, beside it; and return its path.

    Raises:
        UsageError: neither the folder of a finished run nor a bench of vLLM.
    """
    if source.is_file():
        bench = load(Bench, source, UsageError)
        if not bench.serving:
            raise UsageError(f"{source} is not a bench of vLLM; its page is that of its run: name the run folder")
        path = out or source.with_suffix(".html")
        write_text(path, _page("bench.html.jinja", bench=bench, serving_svg=serving_figure(bench)))
        return path
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder; name the run folder that `layerboost run` wrote, or a bench.json")
    missing = [name for _, name in _PARTS.values() if not (source / name).is_file()]
    if missing:
        raise UsageError(f"{source} is not a finished run: {missing[0]} is missing; finish it with `layerboost run`")
    parts = {name: load(kind, source / file, UsageError) for name, (kind, file) in _PARTS.items()}
    path = out or source / "report.html"
    write_text(path, render(**parts))
    return path


def render(
    result: Result, sensitivity: Sensitivity, plan: Plan, healing: Healing, evaluation: Evaluation, bench: Bench
) -> str:
    return _page(
        "report.html.jinja",
        result=result, sensitivity=sensitivity, plan=plan, healing=healing, evaluation=evaluation, bench=bench,
        sensitivity_svg=sensitivity_figure(sensitivity), healing_svg=healing_figure(healing),
        serving_svg=serving_figure(bench) if bench.serving else "",
    )  # fmt: skip


def _page(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("layerboost.report", ""), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["bytes"] = readable_bytes
    return environment.get_template(template).render(**values)


def readable_bytes(count: float) -> str:
    if count < 1_000:
        return f"{count:,.0f} B"
    power = min(3, int(math.log(count, 1_000)))
    return f"{count / 1_000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}"
