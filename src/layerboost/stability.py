"""stability: do rankings of layers agree across probes, and across data, seeds, lengths and sizes of models?

Spearman's rank correlation over layers, with an interval from resampling the sequences that damages were measured on.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from layerboost.artifacts import Agreement, Estimate, Sensitivity, Stability, Transfer, load, save
from layerboost.damage import DEFAULT_WEIGHTS, check_sensitivity, predicted_loss, resampled_losses
from layerboost.errors import UsageError
from layerboost.knapsack import options, solve
from layerboost.progress import say
from layerboost.provenance import provenance

_KV_REDUCTIONS = (0.4, 0.6, 0.8)
_RESAMPLES = 200
LOSS = "loss"  # text and recall KL together, as planners weigh them


def run(paths: Sequence[Path], *, out: Path | None = None) -> str:
    """Compare sensitivities, and say what came out as tables in Markdown.

    Raises:
        UsageError: a file is named twice, or has no damages.
        PlanError: a file's layers are not those of its model.
    """
    names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise UsageError(f"{max(names, key=names.count)} is named twice")
    found = {name: load(Sensitivity, path) for name, path in zip(names, paths, strict=True)}
    for name, one in found.items():
        if not any(one.layers):
            raise UsageError(f"{name} has no damages of any layer; analyze the model again")
        check_sensitivity(one)
    measured = Stability(
        probes=[a for name, one in found.items() for a in across_probes(name, one)],
        files=[a for pair in itertools.combinations(found, 2) for a in across_files(*pair, found)],
        transfer=[t for a, b in itertools.permutations(found, 2) for t in transfer(a, b, found)],
        provenance=provenance(files={name: one.provenance.get("settings", {}) for name, one in found.items()}),
    )
    if out is not None:
        save(measured, out)
    return markdown(measured)


def across_probes(name: str, sensitivity: Sensitivity) -> list[Agreement]:
    """Every two metrics of one file, over layers, for each mixer; and every two mixers by the loss."""
    metrics = _metrics(sensitivity)
    found = []
    for label in _labels(sensitivity):
        rows = {metric: _losses(sensitivity, label, {metric: 1.0}) for metric in metrics}
        for a, b in itertools.combinations(metrics, 2):
            found.append(_agree(f"{a} / {b}", label, name, rows[a], rows[b]))
    by_label = {label: _losses(sensitivity, label, DEFAULT_WEIGHTS) for label in _labels(sensitivity)}
    for a, b in itertools.combinations(by_label, 2):
        if len(by_label[a]) == len(by_label[b]):
            found.append(_agree(LOSS, f"{a} / {b}", name, by_label[a], by_label[b]))
    return found


def across_files(a: str, b: str, found: dict[str, Sensitivity]) -> list[Agreement]:
    """The same metric and mixer in two files, where it was tried in equally many layers."""
    first, second = found[a], found[b]
    rows = []
    if first.model.num_layers != second.model.num_layers:
        say(f"{a} has {first.model.num_layers} layers, {b} {second.model.num_layers}: their rankings do not compare")
        return []
    for label in [label for label in _labels(first) if label in _labels(second)]:
        for metric in (LOSS, *(m for m in _metrics(first) if m in _metrics(second))):
            weights = DEFAULT_WEIGHTS if metric == LOSS else {metric: 1.0}
            one, other = (_losses(each, label, weights) for each in (first, second))
            if len(one) == len(other):
                rows.append(_agree(metric, label, f"{a} / {b}", one, other))
    return rows


def transfer(a: str, b: str, found: dict[str, Sensitivity]) -> list[Transfer]:
    """What the additive plan of one file loses by another's damages, beside that one's own plan."""
    first, second = found[a], found[b]
    if first.model.num_layers != second.model.num_layers:
        return []
    rows = []
    context = first.model.usual_context
    for kv_reduction in _KV_REDUCTIONS:
        plans = [
            solve(options(one, context, DEFAULT_WEIGHTS), one.model.num_layers, minimise="loss", kv=1 - kv_reduction)
            for one in (first, second)
        ]
        losses = [None if plan is None else predicted_loss(second, plan, DEFAULT_WEIGHTS) for plan in plans]
        if losses[0] is not None and losses[1] is not None:
            rows.append(Transfer(made_on=a, judged_on=b, kv_reduction=kv_reduction, loss=losses[0], own=losses[1]))
    return rows


def _labels(sensitivity: Sensitivity) -> list[str]:
    return list(dict.fromkeys(c.plan.label for own in sensitivity.layers for c in own))


def _metrics(sensitivity: Sensitivity) -> list[str]:
    return list(next((c.damage for own in sensitivity.layers for c in own), {}))


def _losses(sensitivity: Sensitivity, label: str, weights: dict[str, float]) -> np.ndarray:
    """`[L, 1 + R]`: a mixer's loss in every layer that it was tried in, on all sequences and on resampled ones."""
    one = sensitivity.model_copy(
        update={"layers": [[c for c in own if c.plan.label == label] for own in sensitivity.layers]}
    )
    resampled = resampled_losses(one, weights, _RESAMPLES)
    means = [[sum(w * c.damage[m].mean for m, w in weights.items()) for c in own] for own in one.layers]
    return np.array([[mean[0], *row[0]] for mean, row in zip(means, resampled, strict=True) if mean])


def _agree(metric: str, label: str, where: str, a: np.ndarray, b: np.ndarray) -> Agreement:
    """Spearman over layers; nothing can be ranked where all layers are the same."""
    values = [_spearman(a[:, r], b[:, r]) for r in range(a.shape[1])]
    low, high = np.quantile(values[1:], (0.025, 0.975))
    rank = Estimate(mean=values[0], low=float(low), high=float(high), count=len(a))
    return Agreement(metric=metric, mixer=label, where=where, rank=rank)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a, b).statistic)


def markdown(found: Stability) -> str:
    """Three tables."""
    parts = []
    for title, rows in (("Across probes and mixers", found.probes), ("Across files", found.files)):
        lines = [f"## {title}", "", "| where | mixer | metric | Spearman over layers |", "|---|---|---|---|"]
        lines += [
            f"| {r.where} | {r.mixer} | {r.metric} | {r.rank.mean:.2f} ({r.rank.low:.2f} to {r.rank.high:.2f}) |"
            for r in rows
        ]
        parts.append("\n".join(lines))
    lines = [
        "## Plans of one, judged by another",
        "",
        "| made on | judged on | KV saved | loss | own plan's |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {t.made_on} | {t.judged_on} | {t.kv_reduction:.0%} | {t.loss:.4f} | {t.own:.4f} |" for t in found.transfer
    ]
    return "\n\n".join([*parts, "\n".join(lines)])
