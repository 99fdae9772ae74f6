"""What healing takes on GPUs, computed from shapes: memory per device, whether it fits, hours. None of it was run.

    python benchmarks/healing_table.py
    python benchmarks/healing_table.py --measure

The table is of models of 1B, 8B and 70B, 10M tokens at length 4,096, 8 sequences per step and one at a time on each
device, adapters of the default rank on every linear module of every layer, bfloat16. Hours are at 36 % of the data
sheet's rate; what devices tell one another, and unpacking of few bits, are not counted. A device is full at 90 %, the
rest is for its libraries and for fragments.

`--measure` heals a model of 101M parameters on this machine instead, in processes of their own, and sets the peak of
their memory beside the formula's, with and without gradient checkpointing, under which writing the result takes most.
The C library is told to hand back what is freed; by itself it keeps up to a gigabyte.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layerboost import convert, heal
from layerboost.artifacts import Plan
from layerboost.cost.device import Device, known_device
from layerboost.estimate import healing_memory, healing_on_cpu, healing_seconds
from layerboost.layer_plan import LayerPlan
from layerboost.model.loading import find_model, load_tokenizer, read_config

# shapes of Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B
COMMON = {"vocab_size": 128_256, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
MODELS = {
    "1B": {"hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "head_dim": 64, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8_192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}  # fmt: skip
DEVICES = {"1 x A10 (24 GB)": ("a10", 1), "1 x H100 (80 GB)": ("h100", 1), "8 x H100 (80 GB)": ("h100", 8)}
HEALING = {"tokens": "10M", "length": 4_096, "batch": 8, "micro_batch": 1}
FULL_AT = 0.9
SAVING, LOGITS = {"gradient_checkpointing": True}, {"losses": {"forward_kl": 1}}
# from what costs least to what costs most: layers run again, traffic, rounding, and a loss the less
REMEDIES = [
    {}, SAVING, SAVING | {"shard": True}, SAVING | {"quantize": "int8"}, SAVING | {"quantize": "int8"} | LOGITS,
    SAVING | {"quantize": "int4"} | LOGITS,
]  # fmt: skip


def show(settings: dict) -> str:
    return " ".join(f"{key}={json.dumps(value).replace(chr(34), '')}" for key, value in settings.items()) or "defaults"


def remedies(devices: int) -> list[dict]:
    return [remedy for remedy in REMEDIES if devices > 1 or "shard" not in remedy]


def row(model: str, place: str, config: LlamaConfig, remedy: dict, device: Device, devices: int) -> tuple[str, bool]:
    settings = heal.Config(**HEALING, **remedy)
    found = healing_memory(config, settings, devices=devices)
    fits = found.total < FULL_AT * device.memory
    parts = (found.frozen, found.trained, found.activations, found.logits, found.total)
    hours = healing_seconds(config, settings, device, devices) / 3_600
    cells = [model, place, show(remedy), *(f"{part / 1e9:.1f}" for part in parts), "yes" if fits else "no"]
    return " | ".join([*cells, f"{hours:.2f}" if fits else "-"]), fits


def print_table() -> None:
    print("Computed from shapes, not measured.\n")
    print("| model | devices | settings | weights | trained | activations | logits | GB per device | fits | hours |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model, shape in MODELS.items():
        config = LlamaConfig(**(COMMON | shape), dtype=torch.bfloat16)
        for place, (name, devices) in DEVICES.items():
            for remedy in remedies(devices):
                cells, fits = row(model, place, config, remedy, known_device(name), devices)
                print(f"| {cells} |")
                if fits:
                    break
            else:
                print(f"| {model} | {place} | nothing here; more devices and shard=true" + " |" * 8)


# ------------------------------------------------------------------------------------------------------- measuring

SMALL = {
    "vocab_size": 16_384, "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2_048, "bos_token_id": 0,
    "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
SMALL_HEALING = {"tokens": 2_048, "length": 256, "batch": 4, "texts": 2, "answers": 2, "device": "cpu"}


HAND_BACK = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}


def memory(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1_024


def print_peak(root: Path, settings: dict) -> None:
    """Bytes that a healing adds to this process, at its peak."""
    before = memory("VmRSS")
    heal.run(root / "hybrid", root / "base", heal.Config(**settings), out=root / f"healed-{len(settings)}")
    print(memory("VmHWM") - before)


def measure() -> None:
    layers = [LayerPlan("sliding_attention", 128)] * SMALL["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SMALL))
        parameters = sum(p.numel() for p in model.parameters())
        model.save_pretrained(root / "base")
        load_tokenizer(find_model("reference")).save_pretrained(root / "base")
        del model
        convert.run(root / "base", Plan(layers=layers), out=root / "hybrid")
        for remedy in ({}, {"gradient_checkpointing": True}):
            settings = SMALL_HEALING | remedy
            asked = [sys.executable, __file__, "--peak", json.dumps([folder, settings])]
            peak = int(subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, env=HAND_BACK).stdout)
            wanted = healing_on_cpu(read_config(root / "base"), heal.Config(**settings))
            print(
                f"{parameters:,} parameters, float32 on CPU, {show(remedy)}: measured {peak / 1e9:.2f} GB, computed "
                f"{wanted / 1e9:.2f} GB ({wanted / peak - 1:+.0%})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        folder, settings = json.loads(args.peak)
        print_peak(Path(folder), settings)
    elif args.measure:
        torch.set_num_threads(1)
        measure()
    else:
        print_table()


if __name__ == "__main__":
    main()
