"""How long the demo takes, stage by stage, and what comes out of it.

    python benchmarks/demo.py --repeats 3

Every repeat is a whole `layerboost demo` in an empty folder and a process of its own. Speed is hybrid against base
in the same process, interleaved, as `layerboost bench` measures it.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def once(folder: Path) -> tuple[dict[str, float], dict]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "layerboost.cli", "demo", "--out", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = {stage: float(took) for stage, took in re.findall(r"^(\w+): done in (\d+) s$", done.stderr, re.MULTILINE)}
    return seconds | {"in all": time.perf_counter() - started}, json.loads((folder / "result.json").read_text())


def spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runs = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(once(Path(folder) / "run"))
    print(f"median (smallest to largest) of {args.repeats} demos")
    for stage in runs[0][0]:
        print(f"{stage:>9}: {spread([seconds[stage] for seconds, _ in runs])} s")
    results = [result for _, result in runs]
    kv = results[0]["cost"]["kv_bytes_per_token"]
    print(f"KV bytes per token, hybrid / base: {kv['healed'] / kv['base']:.3f}")
    for phase in ("decode", "prefill"):
        medians = [result["speed"][phase]["median"] for result in results]
        print(f"{phase} speed, hybrid / base: {spread(medians, 2)}")
    for name in ("converted", "healed"):
        kl = [result["quality"][name]["kl"] for result in results]
        recall = [result["quality"][name]["recall"]["mean"] for result in results]
        print(f"{name}: KL {spread(kl, 3)}, recall {spread(recall, 3)}")


if __name__ == "__main__":
    main()
