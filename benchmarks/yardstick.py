"""Every plan there is, measured: how far planners stay from the best one.

    python benchmarks/yardstick.py reference --out runs/yardstick

All plans over full attention, one window and no attention of a model of 8 layers (6,561) are measured on fixed data,
sharing their beginnings. At 2, 4 and 6 removed layers and at three KV costs, each planner's plan is set beside the
best: on the data that planners look at, and on other data, of the validation split, on which the best plans of each
budget and those of the planners are measured again. The table is kept, so that a second call only plans.
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
from layerboost.model.loading import digest, find_model, load_original, load_tokenizer
from layerboost.passes import Scorer
from layerboost.progress import progress, say

LETTERS = {"full_attention": "F", "sliding_attention": "W", "no_attention": "N"}
PLANNERS = ("greedy", "milp", "gates", "tiers", "tiers cosine", "uniform", "periodic", "random")


def name_of(layers) -> str:
    return "".join(LETTERS[layer.mixer] for layer in layers)


def plan_of(name: str, window: int) -> list[LayerPlan]:
    given = {"F": KEEP, "W": LayerPlan("sliding_attention", window), "N": LayerPlan("no_attention")}
    return [given[letter] for letter in name]


def every_name(layers: int) -> list[str]:
    return ["".join(letters) for letters in itertools.product("FWN", repeat=layers)]


def weighted(row) -> float:
    return sum(weight * row[metric] for metric, weight in DEFAULT_WEIGHTS.items())


def measure(folder, window: int, split: str, count: int, names) -> dict[str, dict[str, float]]:
    """Mean damages of plans, by their letters."""
    model = load_original(folder, dtype=torch.float32)
    data = samples(
        standard_library(), load_tokenizer(folder), model.config.vocab_size, split=split, texts=count, answers=count,
        length=256, distance=128,
    )  # fmt: skip
    plans = [plan_of(name, window) for name in names]
    scorer = Scorer(model, data)
    base = scorer([[KEEP] * len(model.decoder_layers)])[0]
    with progress(f"plans, {split}", scorer.steps(len(plans))) as advance:
        scores = scorer(plans, advance)
    return {
        name: {metric: float(np.mean(values)) for metric, values in damages(base, found).items()}
        for name, found in zip(names, scores, strict=True)
    }


def kept(path: Path, make) -> dict:
    if not path.exists():
        write_text(path, json.dumps(make()))
    return json.loads(path.read_text())


def budgets(sensitivity: Sensitivity, window: int, context: int):
    """What planners are told, which candidates they may use, and which plans meet it."""
    base = sensitivity.model.kv_bytes([KEEP] * sensitivity.model.num_layers, context)
    plans = {name: plan_of(name, window) for name in every_name(sensitivity.model.num_layers)}
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
    parser.add_argument("--again", type=int, default=50, help="best plans of a budget that other data judges again")
    parser.add_argument("--planners", nargs="+", default=PLANNERS)
    args = parser.parse_args()
    folder = find_model(args.model)
    made = args.out / f"{digest(folder)[:8]}-{args.window}-{args.count}"  # of other settings, others
    made.mkdir(parents=True, exist_ok=True)
    path = made / "sensitivity.json"
    if not path.exists():
        analyze.run(args.model, analyze.Config(windows=[args.window], texts=args.count, answers=args.count), out=path)
    sensitivity = load(Sensitivity, path)
    every = every_name(sensitivity.model.num_layers)
    table = kept(made / "train.json", lambda: measure(folder, args.window, "train", args.count, every))
    found = []
    for budget, told, letters, met in budgets(sensitivity, args.window, 256):
        order = sorted(met, key=lambda name: weighted(table[name]))
        say(f"{budget}: {len(met)} plans, the best is {order[0]}")
        found.append((budget, order, planned(args, sensitivity, told, letters)))
    again = {
        name for _, order, made in found for name in (*order[: args.again], *(m[0] for m in made.values() if m[0]))
    }
    other = measure(folder, args.window, "validation", 4 * args.count, sorted(again))
    head = [
        "budget",
        "planner",
        "plan",
        "loss",
        "over the best",
        "rank",
        "other data: over its best",
        "forwards",
        "seconds",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget, order, made in found:
        best = weighted(table[order[0]]), min(weighted(other[name]) for name in order if name in other)
        for planner, (name, forwards, seconds) in made.items():
            if name is None:
                lines.append(f"| {budget} | {planner} | none" + " |" * (len(head) - 2))
                continue
            own = weighted(table[name]), weighted(other[name])
            cells = [
                budget, planner, name, f"{own[0]:.4f}", f"{own[0] / best[0] - 1:.1%}",
                f"{order.index(name) + 1} of {len(order)}", f"{own[1] / best[1] - 1:.1%}", f"{forwards:.0f}",
                f"{seconds:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    write_text(args.out / "yardstick.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


def planned(args, sensitivity: Sensitivity, told: dict, letters: str) -> dict[str, tuple[str | None, float, float]]:
    """Every planner's plan at a budget, the forward passes that it measured, and seconds."""
    allowed = sensitivity.model_copy(
        update={"layers": [[c for c in own if LETTERS[c.mixer] in letters] for own in sensitivity.layers]}
    )
    found = {}
    for planner in args.planners:
        name, _, score = planner.partition(" ")
        settings = {"planner": name, "context": 256, "measuring": {"texts": args.count, "answers": args.count}, **told}
        if score:
            settings["tiers"] = {"score": score}
        started = time.monotonic()
        try:
            made = plan.run(allowed, plan.Config.model_validate(settings), model=args.model)
        except PlanError as trouble:
            say(f"{planner}: {trouble}")
            found[planner] = None, 0.0, 0.0
            continue
        forwards = made.measured.get("cost", {}).get("forwards", 0.0)
        found[planner] = name_of(made.layers), forwards, time.monotonic() - started
    return found


if __name__ == "__main__":
    main()
