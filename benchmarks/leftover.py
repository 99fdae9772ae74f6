"""Where the distance to the original is that healing leaves: by a token's place, and by how sure the original is.

    python benchmarks/leftover.py runs/demo/hybrid runs/demo/healed reference

At the first tokens of a text no window hides anything, so what is lost there is what removed attention costs, or what
healing moved that was right before. Text of the train split beside held-out text tells whether healing has learned
its text by heart.
"""

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from layerboost.data.corpus import open_corpus
from layerboost.data.sequences import text_sequences
from layerboost.model.loading import find_model, load_model, load_original, load_tokenizer

PLACES = (1, 32, 64, 128, 256)
ENTROPIES = (0.0, 0.1, 0.5, 1.5, float("inf"))


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """`[B, T]` ids to `[B, T, V]` float32."""
    return torch.cat([model(input_ids=rows).logits.float().log_softmax(-1) for rows in tokens.split(8)])


def line(name: str, kl: Tensor, entropy: Tensor) -> str:
    """Mean KL `[B, T]` in nats: of all tokens, by place, by the original's entropy."""
    places = [kl[:, low:high] for low, high in pairwise(PLACES)]
    sure = [kl[(entropy >= low) & (entropy < high)] for low, high in pairwise(ENTROPIES)]
    means = [f"{values.mean().item():.4f}" for values in (kl[:, 1:], *places, *sure)]
    return f"| {name} | " + " | ".join(means) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted", type=Path)
    parser.add_argument("healed", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=int, default=64)
    args = parser.parse_args()
    folder = find_model(args.model)
    original = load_original(folder, dtype=torch.float32).eval()
    hybrids = {which: load_model(getattr(args, which), dtype=torch.float32).eval() for which in ("converted", "healed")}
    heads = [f"tokens {low} to {high - 1}" for low, high in pairwise(PLACES)]
    heads += [f"entropy {low} to {high}" for low, high in pairwise(ENTROPIES)]
    print("| KL, nats | all | " + " | ".join(heads) + " |\n" + "|---" * (len(heads) + 2) + "|")
    for split in ("train", "held_out"):
        tokens = text_sequences(
            open_corpus(None).split(split), load_tokenizer(folder), count=args.texts, length=PLACES[-1], seed=1
        ).tokens
        expected = log_probabilities(original, tokens)
        entropy = -(expected.exp() * expected).sum(-1)
        for which, hybrid in hybrids.items():
            found = log_probabilities(hybrid, tokens)
            print(line(f"{which}, {split}", (expected.exp() * (expected - found)).sum(-1), entropy), flush=True)


if __name__ == "__main__":
    main()
