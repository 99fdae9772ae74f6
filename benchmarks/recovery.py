"""What healing recovers, and what of its recipe matters: one thing changed at a time, the same tokens, several seeds.

    python benchmarks/recovery.py runs/small-1 plan.json --out runs/recovery                  # the ablations
    python benchmarks/recovery.py runs/small-1 plan.json --out runs/scaling --groups tokens   # 0.1M to 10M tokens

Every healing is judged on held-out data that nothing else has seen: share of the gap in text KL and NLL that it closed,
and recall. Results are kept per healing, so that a second call goes on; a healing that was killed goes on too.
"""

import argparse
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from layerboost import convert, evaluate, heal
from layerboost.artifacts import Plan, load, text_digest, write_text
from layerboost.model.loading import digest, find_model
from layerboost.progress import say

KL = {"forward_kl": 1.0}
GROUPS = {
    "loss": {
        "KL": {"losses": KL},
        "KL + 5 hidden": {"losses": KL | {"hidden": 5.0}},
        "KL + 20 hidden": {"losses": KL | {"hidden": 20.0}},
        "KL + 80 hidden": {"losses": KL | {"hidden": 80.0}},
        "hidden": {"losses": {"hidden": 20.0}},
        "KL + 20 cosine": {"losses": KL | {"cosine": 20.0}},
        "KL + 1 attention": {"losses": KL | {"attention": 1.0}},
        "KL + 1 values": {"losses": KL | {"values": 1.0}},
        "reverse KL": {"losses": {"reverse_kl": 1.0}},
        "Jensen-Shannon": {"losses": {"jensen_shannon": 1.0}},
        "CE": {"losses": {"cross_entropy": 1.0}},
        "KL + CE": {"losses": KL | {"cross_entropy": 1.0}},
    },
    "what is trained": {
        "LoRA r8": {"rank": 8},
        "LoRA r32": {"rank": 32},
        "LoRA r64": {"rank": 64},
        "LoRA r128": {"rank": 128},
        "norms as well": {"norms": True},
        "attention only": {"targets": ["kept.attention", "changed.attention"]},
        "MLPs only": {"targets": ["kept.mlp", "changed.mlp", "removed.mlp"]},
        "changed layers only": {"targets": ["changed", "removed"]},
        "all weights": {"train": "full"},
    },
    "learning rate": {f"{rate} / hidden": {"rate": rate} for rate in (0.125, 0.25, 0.5, 1.0, 2.0)},
    "data": {
        "text": {"probe_share": 0.0},
        "text, 20 % probes": {"probe_share": 0.2},
        "text, 40 % probes": {"probe_share": 0.4},
        "text, 70 % probes": {"probe_share": 0.7},
        "a third each of text, probes, the teacher's own": {
            "data": [{"kind": "text"}, {"kind": "probes"}, {"kind": "generated"}]
        },
    },
    "length": {"64 x 16": {"length": 64, "batch": 16}, "128 x 8": {"length": 128, "batch": 8},
               "256 x 4": {"length": 256}, "512 x 2": {"length": 512, "batch": 2}},
    "sinks": {"without": {}, "with": {"sinks": True}},
    "attention transfer": {f"{share}": {"transfer_share": share} for share in (0.0, 0.1, 0.2, 0.4)},
    "tokens": {name: {"tokens": name} for name in ("100k", "300k", "1M", "3M", "10M")},
}  # fmt: skip
COLUMNS = ("KL closed", "NLL closed", "text KL", "recall", "short of base")


def settings(words: list[str]) -> dict:
    """From `key=value`."""
    return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}


def variant(model: Path, plan: Path, out: Path, name: str, changes: dict, seed: int, args) -> dict:
    """One healing, judged; from its file if that is there, under whatever name it was made."""
    changes = {"tokens": args.tokens, "length": 256, "seed": seed} | changes
    usual = 0.125 if changes.get("train") == "full" else 0.5
    width = json.loads((find_model(model) / "config.json").read_text())["hidden_size"]
    changes["learning_rate"] = changes.pop("rate", usual) / width
    sinks = changes.pop("sinks", False)
    layers = load(Plan, plan).layers
    if sinks:
        layers = [dataclasses.replace(layer, sink=True) if layer.window else layer for layer in layers]
    config = heal.Config(**changes)
    made_from = [
        digest(find_model(model)),
        config.model_dump(mode="json"),
        [layer.entry() for layer in layers],
        args.answers,
    ]
    if args.bfloat16:
        made_from.append("bfloat16")
    kept = out / f"{text_digest(made_from)[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    say(f"{name}, seed {seed}")
    work = out / f"work-{kept.stem}"
    hybrid = convert.run(model, Plan(layers=layers), out=work / "hybrid")
    healing = heal.run(hybrid, model, config, out=work / "healed")
    judged = evaluate.run(
        work / "healed", model, evaluate.Config(texts=64, answers=args.answers, completions=0, seed=seed)
    ).models
    base, before, after = (judged[which] for which in ("base", "converted", "healed"))
    found = {
        "KL closed": 1 - after.kl.mean / before.kl.mean,
        "NLL closed": 1 - (after.nll.mean - base.nll.mean) / (before.nll.mean - base.nll.mean),
        "text KL": after.kl.mean,
        "recall": after.recall["mean"].mean,
        "short of base": base.recall["mean"].mean - after.recall["mean"].mean,
        "before": before.kl.mean,
        "recall before": before.recall["mean"].mean,
        "tokens": healing.tokens,
        "name": name,
        "seed": seed,
        "curve": [point.model_dump() | {"closed": healing.closed(point)} for point in healing.curve],
        "alarms": healing.alarms,
    }
    write_text(kept, json.dumps(found, indent=1))
    shutil.rmtree(work)
    return found


def table(group: str, results: dict[str, list[dict]]) -> str:
    lines = [f"| {group} | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, found in results.items():
        cells = [cell(column, [r[column] for r in found]) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(column: str, values: list[float]) -> str:
    """Mean, and the range over seeds."""
    factor, digits, unit = (1, 3, "") if column == "text KL" else (100, 1, " %")
    mean, low, high = (f"{factor * f(values):.{digits}f}" for f in (np.mean, np.min, np.max))
    return f"{mean}{unit}" + (f" ({low} to {high})" if len(values) > 1 else "")


def draw(results: dict[str, list[dict]], path: Path) -> None:
    """KL gap closed and recall over tokens: whole healings of so many, and what the longest closed on its way."""
    figure = Figure(figsize=(9.5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole = [found for healings in results.values() for found in healings]
    left, right = figure.subplots(1, 2)
    for axes, column, title in ((left, "KL closed", "KL gap closed, %"), (right, "recall", "Recall, %")):
        for n, seed in enumerate(sorted({found["seed"] for found in whole})):
            line = [(found["tokens"], 100 * found[column]) for found in whole if found["seed"] == seed]
            label = None if n else "held out, whole healings"
            axes.plot(*zip(*line, strict=True), marker="o", color="#2f5d8a", label=label)
        axes.set(xscale="log", xlabel="tokens of healing")
        axes.set_title(title, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    longest = max(whole, key=lambda found: found["tokens"])
    way = [(point["tokens"], 100 * point["closed"]["kl"]) for point in longest["curve"] if point["tokens"]]
    left.plot(*zip(*way, strict=True), ls=":", color="#b4534b", label="validation, on the way of the longest")
    left.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=[g for g in GROUPS if g != "tokens"])
    parser.add_argument("--only", nargs="+", help="variants by name; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", default="100k", help="of every healing, but in the group tokens")
    parser.add_argument("--heal", nargs="+", default=[], help="settings of every healing, as key=value", metavar="SET")
    parser.add_argument("--answers", type=int, default=200, help="held-out sequences of each probe")
    parser.add_argument(
        "--bfloat16", action="store_true", help="multiply matrices in bfloat16 on a CPU that has units for it; faster"
    )
    args = parser.parse_args()
    if "learning_rate" in settings(args.heal):
        parser.error("--heal: say rate, which is over the hidden size, and not learning_rate")
    if args.bfloat16:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    args.out.mkdir(parents=True, exist_ok=True)
    tables = []
    for group in args.groups:
        results: dict[str, list[dict]] = {}
        for seed in args.seeds:
            for name, changes in GROUPS[group].items():
                usual = {} if group == "tokens" else {"texts": 8, "answers": 8}  # looks take most of so short a healing
                changes = usual | settings(args.heal) | changes
                if args.only and name not in args.only:
                    continue
                found = variant(args.model, args.plan, args.out, f"{group} {name}", changes, seed, args)
                results.setdefault(name, []).append(found)
        tables.append(table(group, results))
        print(tables[-1] + "\n", flush=True)
        if group == "tokens":
            draw(results, args.out / "tokens.png")
    write_text(args.out / "recovery.md", "\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
