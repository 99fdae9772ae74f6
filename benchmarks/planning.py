"""How long the additive planner takes for a deep model: 126 layers, 8 candidates each, at three budgets.

    python benchmarks/planning.py

CPU time of `plan.run` on made-up damages, its checks, front and reasons included; one thread. Beside it, in the same
run, the time that HiGHS alone takes for the same knapsacks where a cost is a sum over layers.
"""

import argparse
import statistics
import time

import numpy as np

from layerboost import plan
from layerboost.artifacts import Candidate, Damage, KVShape, ModelRecord, Sensitivity
from layerboost.knapsack import options, solve
from layerboost.layer_plan import LayerPlan

WINDOWS = (16, 64, 128, 256, 512, 1_024, 2_048)
REDUCTIONS = (0.3, 0.5, 0.7)


def made_up(layers: int, seed: int) -> Sensitivity:
    """Damages that fall with the window, of all sizes."""
    rng = np.random.default_rng(seed)
    tried = [LayerPlan("no_attention"), *(LayerPlan("sliding_attention", window) for window in WINDOWS)]
    rows = -np.sort(-rng.lognormal(-3, 1.5, (layers, len(tried))), axis=1)
    model = ModelRecord(
        name="made up", digest="", num_layers=layers, native_windows=[None] * layers, context=4_096,
        kv_shape=KVShape(num_key_value_heads=8, head_dim=128, bytes_per_value=2),
    )  # fmt: skip

    def candidate(layer: LayerPlan, loss: float) -> Candidate:
        damage = Damage(mean=loss, low=loss, high=loss)
        return Candidate.of(layer, {"text_kl": damage, "recall_kl": damage})

    return Sensitivity(
        model=model, layers=[[candidate(p, float(x)) for p, x in zip(tried, row, strict=True)] for row in rows]
    )


def seconds(function) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def show(what: str, found: list[float]) -> None:
    print(f"{what}: {statistics.median(found):.2f} s (largest {max(found):.2f}, {len(found)} plans)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {"transformers": [], "vllm": [], "HiGHS alone": []}
    for seed in range(args.repeats):
        sensitivity = made_up(args.layers, seed)
        for reduction in REDUCTIONS:
            for engine in ("transformers", "vllm"):
                config = plan.Config(kv_reduction=reduction, engine=engine)
                times[engine].append(seconds(lambda s=sensitivity, c=config: plan.run(s, c)))
            choices = options(sensitivity, 4_096, plan.Config().weights)
            times["HiGHS alone"].append(
                seconds(lambda o=choices, r=reduction: solve(o, args.layers, minimise="loss", kv=1 - r))
            )
    for what, found in times.items():
        show(f"{args.layers} layers x {1 + len(WINDOWS)} candidates, {what}", found)
    for engine in ("transformers", "vllm"):
        ratios = [ours / alone for ours, alone in zip(times[engine], times["HiGHS alone"], strict=True)]
        print(f"{engine} over HiGHS alone: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
