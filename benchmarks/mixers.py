"""What may stand in the moderate layers? The same layers of the reference model with one mixer after another.

    python benchmarks/mixers.py --out runs/mixers

Layers 3 to 5 keep softmax, the other five get the mixer; every hybrid is healed and evaluated with the same data and
settings, and the same number of tokens, attention transfer included. Prints a table with 95 % intervals; a killed run
goes on with what is missing.
"""

import argparse
import json
from pathlib import Path

from layerboost import convert, evaluate, heal
from layerboost.artifacts import Evaluation, Plan, load, recorded_inputs
from layerboost.layer_plan import KEEP, LayerPlan
from layerboost.progress import say

KEPT = (3, 4, 5)
MIXERS = {
    "window 64": {"mixer": "sliding_attention", "window": 64},
    "window 16": {"mixer": "sliding_attention", "window": 16},
    "window 16 with sinks": {"mixer": "sliding_attention", "window": 16, "sink": True},
    "lolcats, window 16": {"mixer": "linear_attention", "variant": "lolcats", "window": 16},
    "linear (elu + 1)": {"mixer": "linear_attention", "variant": "linear"},
    "performer": {"mixer": "linear_attention", "variant": "performer"},
    "gla": {"mixer": "linear_attention", "variant": "gla"},
    "none": {"mixer": "no_attention"},
}


def measure(name: str, entry: dict, transfer: float, args: argparse.Namespace) -> Evaluation:
    plain = "".join(c for c in name if c.isalnum() or c == " ").replace(" ", "-")
    folder = args.out / f"{plain}-{transfer:g}-{args.tokens}-{args.seed}"
    layers = [KEEP if i in KEPT else LayerPlan(**entry) for i in range(8)]
    if recorded_inputs(folder / "evaluation.json") is None:
        convert.run("reference", Plan(layers=layers), out=folder / "hybrid")
        settings = heal.Config(tokens=args.tokens, length=256, seed=args.seed, transfer_share=transfer)
        heal.run(folder / "hybrid", "reference", settings, out=folder / "healed")
        judged = evaluate.Config(texts=64, answers=250, completions=0)
        evaluate.run(folder / "healed", "reference", judged, out=folder / "evaluation.json")
    return load(Evaluation, folder / "evaluation.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| mixer in five of eight layers | KL converted | KL healed | recall converted | recall healed |")
    print("|---|---|---|---|---|")
    for name, entry in MIXERS.items():
        learns = entry.get("variant") in ("lolcats", "gla")  # the others have nothing that attention transfer teaches
        for transfer in (0.2, 0.0) if learns else (0.0,):
            say(f"{name}, transfer share {transfer}: {json.dumps(entry)}")
            found = measure(name, entry, transfer, args).models
            title = f"{name}, transfer {transfer:.0%}" if learns else name
            cells = [found[m].kl.show() for m in ("converted", "healed")]
            cells += [found[m].recall["mean"].show(percent=True) for m in ("converted", "healed")]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
