"""Throughput on vLLM under load, the cost of the plugin itself, and how well the cost model foretells both.

    python benchmarks/serving.py claim --out runs/serving        # the plan 25/50/25 against its base, five pairs
    python benchmarks/serving.py overhead --out runs/serving     # all layers full against vLLM's own class, ten pairs
    python benchmarks/serving.py grid --out runs/serving         # other plans, lengths and cache sizes
    python benchmarks/serving.py decode --out runs/serving       # 16 requests, longer and longer outputs
    python benchmarks/serving.py own --plan plan.json --out runs/serving  # a plan of your own for 8 layers, five pairs
    python benchmarks/serving.py foretold --out runs/serving     # fit four loads, predict all others

The shape is Qwen3-4B's at an eighth of its width: hidden, intermediate, query and key/value sizes keep their
proportions, with 16 query and 4 key/value heads of 32. Weights are random. At this width a context weighs eight times
as much against the weights as in the real model.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np

from layerboost.artifacts import Bench, load, text_digest
from layerboost.bench import Config, Serving, run_shape
from layerboost.model.shapes import Shape
from layerboost.predict import calibrate_on, summary

SHAPE = Shape(name="qwen3-4b", layers=8, width=0.125, vocabulary=4096, heads=16, kv_heads=4, head_dim=32)
LENGTHS = [(256, 64), (512, 128), (1024, 128)]
GRID = [
    ("50/25/25", 64, {"prompt_tokens": 512, "output_tokens": 128, "concurrency": [50, 200]}),
    ("25/0/75", 64, {"prompt_tokens": 256, "output_tokens": 128, "concurrency": [200]}),
    ("25/75/0", 32, {"prompt_tokens": 384, "output_tokens": 64, "concurrency": [100], "kv": ["ample", 60_000_000]}),
    ("50/50/0", 128, {"prompt_tokens": 768, "output_tokens": 64, "concurrency": [100]}),
    ("12.5/50/37.5", 64, {"prompt_tokens": 128, "output_tokens": 256, "concurrency": [50, 100]}),
]


def claim(out: Path, repeats: int) -> None:
    for prompt, output in LENGTHS:
        serving = Serving(prompt_tokens=prompt, output_tokens=output, concurrency=[50, 100, 200])
        if prompt > 512:  # which takes long, and is there for the highest concurrency
            serving = serving.model_copy(update={"concurrency": [200]})
        measure(out / f"claim-{prompt}+{output}.json", SHAPE, serving, repeats)


def overhead(out: Path, repeats: int) -> None:
    serving = Serving(concurrency=[100], kv=["ample"])
    bench = measure(out / "overhead.json", SHAPE.model_copy(update={"plan": "100/0/0"}), serving, repeats)
    cell = bench.serving[0]
    steps = {name: {served.steps for served in runs} for name, runs in cell.runs.items()}
    base, hybrid = (np.array([s.cpu_seconds for s in cell.runs[name]]) for name in ("base", "healed"))
    costs = hybrid / base - 1
    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(costs, (10_000, len(costs))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    print(f"all layers full costs {np.median(costs):+.2%} CPU time (95 % interval {low:+.2%} to {high:+.2%}, "
          f"{len(costs)} pairs), steps {steps}")  # fmt: skip


def grid(out: Path, repeats: int) -> None:
    for number, (plan, window, loads) in enumerate(GRID):
        shape = SHAPE.model_copy(update={"plan": plan, "window": window})
        measure(out / f"grid-{number}.json", shape, Serving(**loads), repeats)


def own(out: Path, repeats: int, plan: Path) -> None:
    """The layers of a plan file; at the lengths and caches of the claim that load the cache most."""
    shape = SHAPE.model_copy(update={"plan": str(plan)})
    name = text_digest([layer.entry() for layer in shape.layer_plan(shape.layers or 0)])[:8]
    for prompt, output in LENGTHS[1:]:
        serving = Serving(prompt_tokens=prompt, output_tokens=output, concurrency=[200], kv=["limited"])
        measure(out / f"own-{name}-{prompt}+{output}.json", shape, serving, repeats)


def decode(out: Path, repeats: int) -> None:
    serving = Serving(
        concurrency=[16], prompt_tokens=128, output_tokens=64, kv=["ample"], decode_lengths=[128, 256, 512, 1024]
    )
    bench = measure(out / "decode.json", SHAPE, serving, repeats)
    for cell in bench.serving:
        latency = " to ".join(f"{1_000 * cell.median(name, 'tpot'):.1f}" for name in ("base", "healed"))
        cache = " to ".join(f"{cell.median(name, 'kv_used') * cell.kv_memory / 1e6:.1f}" for name in ("base", "healed"))
        print(f"16 requests of 128+{cell.load.output_tokens} tokens: {latency} ms per token, {cache} MB of cache")


def foretold(out: Path, cells: str) -> None:
    rows = calibrate_on(sorted(out.glob("claim-*.json")) + sorted(out.glob("grid-*.json")), cells, "cpu_seconds",
                        out=out / "device.json")  # fmt: skip
    for number, row in enumerate(rows):
        print(f"{number:2} {'fitted' if row.fitted else '      '} {row.name:60} ratio {row.ratio:.2f}, predicted "
              f"{row.predicted_ratio:.2f} ({row.ratio_error:+.1%}); base error {row.base_error:+.1%}")  # fmt: skip
        print("          where the base's time goes: " + ", ".join(f"{k} {v:.0%}" for k, v in row.shares.items()))
    print(summary(rows))


def measure(path: Path, shape: Shape, serving: Serving, repeats: int) -> Bench:
    if not path.exists():  # goes on where it was stopped
        run_shape(shape, Config(engine="vllm", repeats=repeats, serving=serving), out=path)
    bench = load(Bench, path)
    plan = shape.plan if Path(shape.plan).is_file() else f"{shape.plan}, window {shape.window or 64}"
    for cell in bench.serving:
        base, hybrid = (cell.tokens_per_second(name) for name in ("base", "healed"))
        running = " to ".join(f"{cell.median(name, 'running'):.0f}" for name in ("base", "healed"))
        print(
            f"{plan}: KV {cell.kv}, {cell.load.concurrency} at once, "
            f"{cell.load.prompt_tokens}+{cell.load.output_tokens}: "
            f"{base:,.0f} to {hybrid:,.0f} tokens/s, ratio {cell.throughput.show()}, "
            f"CPU time {cell.cpu_throughput.show()}, in work {running}",
            flush=True,
        )
    return bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["claim", "overhead", "grid", "own", "decode", "foretold"])
    parser.add_argument("--plan", type=Path, help="of own: a plan.json for 8 layers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--repeats",
        type=int,
        help="pairs; 5 for the claim and your own, 10 for the overhead, 2 for the grid, 3 for decode",
    )
    parser.add_argument("--fit", default="2,7,9,12", help="numbers of the loads to fit, at most 4")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.what == "foretold":
        foretold(asked.out, asked.fit)
    else:
        measurement, repeats = {
            "own": (partial(own, plan=asked.plan), 5),
            "claim": (claim, 5),
            "overhead": (overhead, 10),
            "grid": (grid, 2),
            "decode": (decode, 3),
        }[asked.what]
        measurement(asked.out, asked.repeats or repeats)


if __name__ == "__main__":
    main()
