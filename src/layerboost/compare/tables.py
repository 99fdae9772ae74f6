"""A comparison as people read it: tables and a plot."""

from collections import Counter
from pathlib import Path

from layerboost.artifacts import Comparison, Entry
from layerboost.layer_plan import short


def names(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(entry.name for entry in comparison.entries))


def markdown(comparison: Comparison) -> str:
    """One table per model with a row per way and seed, and one that counts where the default wins, ties and loses."""
    parts = ["# Comparison\n"]
    for model in dict.fromkeys(entry.model for entry in comparison.entries):
        parts.append(f"## {Path(model).name}\n\n" + _table([e for e in comparison.entries if e.model == model]))
    parts.append(f"## Where `{comparison.default}` wins, ties and loses, after healing\n\n" + _verdicts(comparison))
    return "\n".join(parts)


def _table(entries: list[Entry]) -> str:
    lines = [
        "| way | seed | plan | KV | loss before | loss after | recall lost before | after | cost | default, after |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        if e.trial is None:
            lines.append(f"| {e.name} | {e.seed} | {e.verdict['after']} | | | | | | | |")
            continue
        cells = [
            e.name, str(e.seed), " ".join(map(short, e.plan)), f"{e.kv_share:.1%}", f"{e.loss['before'].mean:.3f}",
            e.loss["after"].show(), f"{e.recall_lost['before'].mean:.1%}", e.recall_lost["after"].show(percent=True),
            f"{e.cost:.0f}", e.verdict.get("after", ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _verdicts(comparison: Comparison) -> str:
    lines = ["| against | loss: wins / ties / loses / same plan | recall: the same |", "|---|---|---|"]
    for name in names(comparison):
        if name != comparison.default:
            own = [e for e in comparison.entries if e.name == name and e.trial is not None]
            cells = [_count(Counter(e.verdict[what] for e in own)) for what in ("after", "recall after")]
            lines.append(f"| {name} | {' | '.join(cells)} |" if own else f"| {name} | no plan | |")
    return "\n".join(lines) + "\n"


def _count(found: Counter[str]) -> str:
    return " / ".join(str(found[verdict]) for verdict in ("wins", "ties", "loses", "same plan"))


def figures(comparison: Comparison, path: Path) -> None:
    """Loss after healing of every way, one panel per model; a dot per seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    models = list(dict.fromkeys(entry.model for entry in comparison.entries))
    ways = names(comparison)
    figure, panels = plt.subplots(
        1, len(models), figsize=(1 + 4.5 * len(models), 1 + 0.28 * len(ways)), sharey=True, squeeze=False
    )
    for panel, model in zip(panels[0], models, strict=True):
        tried = [e for e in comparison.entries if e.model == model and e.trial is not None]
        for when, colour in (("before", "0.75"), ("after", "tab:blue")):
            losses = [e.loss[when].mean for e in tried]
            panel.scatter(losses, [ways.index(e.name) for e in tried], c=colour, s=18, label=f"{when} healing")
        panel.set_title(Path(model).name)
        panel.set_xlabel("held-out loss, nats per token")
        if any(loss.mean > 0 for e in tried for loss in e.loss.values()):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(ways)), ways)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)
