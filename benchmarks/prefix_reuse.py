"""What sharing the beginnings of plans saves: scoring plans of one model by a whole forward pass each, against ours.

    python benchmarks/prefix_reuse.py

Both compute the same scores of the same plans on the same batch; that they are bit-equal is asserted. CPU time of
the process, one thread, interleaved, in one run.
"""

import argparse
import statistics
import time

import torch
from transformers import Qwen3Config

from layerboost.analyze import candidates_for, one_changed
from layerboost.artifacts import KVShape, ModelRecord
from layerboost.data.sequences import Sequences
from layerboost.layer_plan import KEEP, full_plan
from layerboost.model.config import hybrid_config
from layerboost.model.hybrid import LogitsHead, model_class
from layerboost.passes import Scorer
from layerboost.progress import say
from layerboost.scoring import final_hidden, log_probabilities, scored_hidden, scored_targets, token_scores


def build(args: argparse.Namespace):
    config = Qwen3Config(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
        num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32, num_key_value_heads=args.hidden // 64,
        head_dim=32, max_position_embeddings=4 * args.length,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class("qwen3")(hybrid_config(config, full_plan(args.layers))).eval()


def ours(model, data, plans):
    return Scorer(model, data)(plans)


def naive(model, data, plans):
    """The whole model once per plan, and once as teacher."""
    batch, head = data["text"], LogitsHead(model)
    scored, targets = batch.scored, scored_targets(batch)

    def score(teacher):
        hidden = scored_hidden(final_hidden(model, batch.tokens), scored)
        teacher = log_probabilities(hidden, head) if teacher is None else teacher
        return teacher, token_scores(hidden, head, teacher, targets).per_sequence(scored)

    with torch.no_grad():
        teacher, _ = score(None)
        found = []
        for plan in plans:
            with model.mixed({i: layer for i, layer in enumerate(plan) if layer.mixer != "full_attention"}):
                found.append(score(teacher)[1])
    return found


def joint_plans(candidates, count):
    """What a search measures: changes of one layer around a plan that changes several."""
    plan = [own[i % len(own)] if i % 3 else KEEP for i, own in enumerate(candidates)]
    around = [[KEEP if i == layer else p for i, p in enumerate(plan)] for layer in range(len(plan))]
    return [plan, *around][:count]


def cpu_seconds(function, *args):
    started = time.process_time()
    return function(*args), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--window", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = build(args)
    tokens = torch.randint(0, args.vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    scored = torch.ones_like(tokens, dtype=torch.bool)
    scored[:, 0] = False
    data = {"text": Sequences(tokens, scored)}
    record = ModelRecord(
        name="random", digest="", num_layers=args.layers, native_windows=[None] * args.layers, context=4 * args.length,
        kv_shape=KVShape(num_key_value_heads=args.hidden // 64, head_dim=32, bytes_per_value=4),
    )  # fmt: skip
    candidates = candidates_for(record, [args.window])
    sets = {"one layer changed": one_changed(candidates), "around a plan": joint_plans(candidates, args.layers + 1)}
    for what, plans in sets.items():
        ratios = []
        for repeat in range(args.repeats + 1):
            found, our_time = cpu_seconds(ours, model, data, plans)
            wanted, their_time = cpu_seconds(naive, model, data, plans)
            for one, other in zip(found, wanted, strict=True):
                assert (one["text.kl"] == other["kl"]).all()
                assert (one["text.nll"] == other["nll"]).all()
            if repeat:  # the first round warms up
                ratios.append(our_time / their_time)
                say(f"{what}: ours {our_time:.2f} s, naive {their_time:.2f} s, ratio {ratios[-1]:.3f}")
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}, {args.repeats} repeats)"
        size = f"{args.layers} layers, {len(plans)} plans, vocabulary {args.vocabulary}"
        print(f"CPU time of shared beginnings over whole passes, {what}, {size}: {spread}")


if __name__ == "__main__":
    main()
