"""Every plan there is, measured: how far planners stay from the best one.

    python benchmarks/yardstick.py reference --out runs/yardstick

All plans over full attention, one window and no attention of a model of 8 layers (6,561) are measured on fixed data, sharing
their beginnings. Then, at 2, 4 and 6 removed layers and at three KV costs, each planner's plan is set beside the best, on
the data that planners look at and on other data, of the validation split. The tables are kept, so that a second call only plans.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch

from layerboost import analyze, plan
from layerboost.artifacts import Sensitivity, load, write_text
from layerboost.damage import DEFAULT_WEIGHTS, damages
from layerboost.data.corpus import standard_library
from layerboost.data.samples import samples
from layerboost.errors import PlanError
from layerboost.layer_plan import KEEP, LayerPlan
from layerboost.model.loading import find_model, load_original, load_tokenizer
from layerboost.passes import Scorer
from layerboost.progress import progress, say

LETTERS = {"full_attention": "F", "sliding_attention": "W", "no_attention": "N"}
PLANNERS = ("greedy", "milp", "gates", "tiers", "tiers cosine", "uniform", "periodic", "random")


def name_of(layers) -> str:
    return "".join(LETTERS[layer.mixer] for layer in layers)


def weighted(row) -> float:
    return sum(weight * row[metric] for metric, weight in DEFAULT_WEIGHTS.items())


def measure_all(folder, window: int, split: str, count: int, seed: int) -> dict[str, dict[str, float]]:
    """Mean damages of every plan, by its letters."""
    model = load_original(folder, dtype=torch.float32)
    data = samples(
        standard_library(), load_tokenizer(folder), model.config.vocab_size, split=split, texts=count, answers=count,
        length=256, distance=128, seed=seed,
    )  # fmt: skip
    options = [KEEP, LayerPlan("sliding_attention", window), LayerPlan("no_attention")]
    plans = list(itertools.product(options, repeat=len(model.decoder_layers)))
    scorer = Scorer(model, data)
    base = scorer([[KEEP] * len(model.decoder_layers)])[0]
    with progress(f"every plan, {split}", scorer.steps(len(plans))) as advance:
        scores = scorer(plans, advance)
    return {
        name_of(layers): {metric: float(np.mean(values)) for metric, values in damages(base, found).items()}
        for layers, found in zip(plans, scores, strict=True)
    }


def kept(path: Path, make) -> dict:
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def budgets(sensitivity: Sensitivity, window: int, context: int):
    """What planners are told, which candidates they may use, and which plans meet it."""
    base = sensitivity.model.kv_bytes([KEEP] * sensitivity.model.num_layers, context)
    plans = {F: [{"F": KEEP, "W": LayerPlan("sliding_attention", window), "N": LayerPlan("no_attention")}[x] for x in F]
             for F in map("".join, itertools.product("FWN", repeat=sensitivity.model.num_layers))}  # fmt: skip
    for k in (2, 4, 6):
        told = {"kv_reduction": 0.0, "at_least": {"no_attention": k}}
        yield f"{k} removed", told, "N", [p for p in plans if set(p) <= set("FN") and p.count("N") >= k]
    for share in (0.6, 0.45, 0.3):
        met = [p for p, layers in plans.items() if sensitivity.model.kv_bytes(layers, context) <= share * base + 1e-6]
        yield f"KV {share:.0%}", {"kv_reduction": 1 - share}, "WN", met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--count", type=int, default=16, help="sequences of text, and of each probe")
    parser.add_argument("--other", action="store_true", help="measure all plans on the validation split as well")
    parser.add_argument("--planners", nargs="+", default=PLANNERS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = find_model(args.model)
    tables = {"train": kept(args.out / "train.json", lambda: measure_all(folder, args.window, "train", args.count, 0))}
    if args.other:
        found = kept(args.out / "other.json", lambda: measure_all(folder, args.window, "validation", args.count, 0))
        tables["other"] = found
    path = args.out / "sensitivity.json"
    if not path.exists():
        analyze.run(args.model, analyze.Config(windows=[args.window], texts=args.count, answers=args.count), out=path)
    sensitivity = load(Sensitivity, path)
    lines = [
        "| budget | planner | plan | loss | over the best | rank | other data: over its best | forwards |",
        "|" + "---|" * 8,
    ]
    for budget, told, letters, met in budgets(sensitivity, args.window, 256):
        allowed = sensitivity.model_copy(
            update={"layers": [[c for c in own if LETTERS[c.mixer] in letters] for own in sensitivity.layers]}
        )
        order = sorted(met, key=lambda p: weighted(tables["train"][p]))
        best = {which: min(weighted(table[p]) for p in met) for which, table in tables.items()}
        say(f"{budget}: {len(met)} plans, the best is {order[0]}")
        for planner in args.planners:
            name, _, score = planner.partition(" ")
            settings = {"planner": name, "context": 256, **told, **({"tiers": {"score": score}} if score else {}),
                        "measuring": {"texts": args.count, "answers": args.count}}  # fmt: skip
            started = time.monotonic()
            try:
                made = plan.run(allowed, plan.Config.model_validate(settings), model=args.model)
            except PlanError as trouble:
                lines.append(f"| {budget} | {planner} | none: {trouble} | | | | | |")
                continue
            own = name_of(made.layers)
            loss = weighted(tables["train"][own])
            over = {which: weighted(table[own]) / best[which] - 1 for which, table in tables.items()}
            forwards = made.measured.get("cost", {}).get("forwards")
            lines.append(
                f"| {budget} | {planner} | {own} | {loss:.4f} | {over['train']:.1%} | {order.index(own) + 1} of {len(met)} | "
                f"{format(over['other'], '.1%') if 'other' in over else ''} | {forwards or ''} |"
            )
            say(f"{lines[-1]} {time.monotonic() - started:.0f} s")
    write_text(args.out / "yardstick.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
