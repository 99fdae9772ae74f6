"""The report's figures, as SVG that is part of the page."""

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from layerboost.artifacts import Bench, Healing, Sensitivity

_COLOURS = ("#b4534b", "#d99a3d", "#4f8f8b", "#7b6fb0", "#8a8a8a")
_STYLE = {
    "svg.hashsalt": "layerboost",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
}


def sensitivity_figure(sensitivity: Sensitivity) -> str:
    """Damage per layer and mixer, text above recall, with intervals."""
    labels = sorted(
        {candidate.plan.label for layer in sensitivity.layers for candidate in layer},
        key=lambda label: (not label.startswith("no_"), len(label), label),
    )
    layers = np.arange(len(sensitivity.layers))
    width = 0.8 / max(1, len(labels))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(9.5, 0.16 * len(layers) * max(1, len(labels))), 5.2), layout="constrained")
        for axes, (metric, title) in zip(
            figure.subplots(2, 1, sharex=True),
            (("text_kl", "Text: KL, nats per token"), ("recall_kl", "Recall answers: KL, nats per token")),
            strict=True,
        ):
            for n, label in enumerate(labels):
                _bars(
                    axes,
                    sensitivity,
                    metric,
                    label,
                    layers + (n - (len(labels) - 1) / 2) * width,
                    width,
                    _COLOURS[n % 5],
                )
            axes.set_title(title)
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.set_xlabel("layer")
        axes.set_xticks(layers)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper right", ncols=min(4, len(labels)), frameon=False
        )
        return _svg(figure, "Damage per layer and mixer")


def _bars(
    axes: Any, sensitivity: Sensitivity, metric: str, label: str, places: np.ndarray, width: float, colour: str
) -> None:
    found = [
        next((c.damage[metric] for c in layer if c.plan.label == label and metric in c.damage), None)
        for layer in sensitivity.layers
    ]
    mean = np.array([0.0 if damage is None else max(damage.mean, 0.0) for damage in found])
    low = np.array([0.0 if damage is None else max(damage.low, 0.0) for damage in found])
    high = np.array([0.0 if damage is None else max(damage.high, 0.0) for damage in found])
    errors = np.clip(np.stack([mean - low, high - mean]), 0, None)
    axes.bar(
        places, mean, width, yerr=errors, color=colour, label=label, error_kw={"elinewidth": 0.8, "ecolor": "#444"}
    )


def healing_figure(healing: Healing) -> str:
    """How far healing closed the gaps to the original, and recall, over tokens on a scale of doublings."""
    points = [point for point in healing.curve if point.tokens] or healing.curve
    tokens = [point.tokens for point in points]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9.5, 2.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, colour in (("kl", "#2f5d8a"), ("nll", "#d99a3d")):
            shares = [healing.closed(point)[name] for point in points]
            if None not in shares:
                left.plot(tokens, [100 * share for share in shares], marker="o", ms=3, color=colour, label=name.upper())  # type: ignore[operator]
                left.legend(frameon=False)
        left.set_title("Gap to the original that is closed, %")
        right.plot(tokens, [100 * point.recall for point in points], marker="o", ms=3, color="#4f8f8b", label="hybrid")
        right.axhline(100 * healing.base_recall, ls=":", color="#8a8a8a", label="original")
        right.set_title("Validation recall, %")
        right.set_ylim(0, 102)
        right.legend(frameon=False)
        for axes in (left, right):
            axes.axvline(healing.best.tokens, color="#bbb", lw=0.8, zorder=0)
            axes.set_xlabel("tokens")
            if len(set(tokens)) > 1:
                axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(places=0, sep=""))
        return _svg(figure, "Healing curve")


def serving_figure(bench: Bench) -> str:
    """Output tokens per second of every load, and the time from one token to the next, base beside hybrid."""
    labels = [f"{c.kv}\n{c.load.concurrency} x {c.load.prompt_tokens}+{c.load.output_tokens}" for c in bench.serving]
    places = np.arange(len(labels))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(9.5, 0.9 * len(labels)), 5.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for offset, name, colour, word in ((-0.2, "base", "#8a8a8a", "base"), (0.2, "healed", "#2f5d8a", "hybrid")):
            rates = [[s.output_tokens / s.seconds for s in cell.runs[name]] for cell in bench.serving]
            steps = [[1_000 * s.tpot for s in cell.runs[name]] for cell in bench.serving]
            for axes, values in ((above, rates), (below, steps)):
                middle = np.array([np.median(v) for v in values])
                errors = [middle - [min(v) for v in values], [max(v) for v in values] - middle]
                axes.bar(places + offset, middle, 0.38, yerr=errors, color=colour, label=word,
                         error_kw={"elinewidth": 0.8, "ecolor": "#444"})  # fmt: skip
        above.set_title("Output tokens per second")
        below.set_title("Milliseconds from one token to the next")
        below.set_xticks(places, labels, fontsize=8)
        figure.legend(*above.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
        return _svg(figure, "Throughput and latency under load")


def _svg(figure: Figure, title: str) -> str:
    """The drawing alone, with a title for screen readers and no date, so that equal data gives an equal page."""
    FigureCanvasSVG(figure)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Title": title})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(
        r'<svg ([^>]*?)width="[^"]*"', r'<svg role="img" \1', re.sub(r'height="[\d.]+pt" ', "", svg, count=1), count=1
    )
