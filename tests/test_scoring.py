"""Scores against the slow way, and intervals that cover what they say."""

import numpy as np
import pytest
import torch

from layerboost import scoring
from layerboost.data.sequences import Sequences
from layerboost.evaluate import _quality
from layerboost.pipeline import recovered
from layerboost.scoring import estimate, log_probabilities, scored_hidden, scored_targets, token_scores


@pytest.mark.parametrize("elements", [2**25, 7 * 20, 1])
def test_scores_token_by_token_in_float64(monkeypatch, elements):
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", elements)
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (3, 12))
    scored = torch.rand(3, 12) > 0.5
    scored[:, 0] = False
    scored[2] = False  # a sequence in which nothing counts
    head = torch.nn.Linear(6, 20, bias=False)
    teacher, student = torch.randn(3, 12, 6), torch.randn(3, 12, 6)
    batch = Sequences(tokens, scored)
    with torch.no_grad():
        known = log_probabilities(scored_hidden(teacher, scored), head)
        found = token_scores(scored_hidden(student, scored), head, known, scored_targets(batch)).per_sequence(scored)
        p, q = ((h.double() @ head.weight.double().T).log_softmax(-1) for h in (teacher, student))
    for n in range(3):
        wanted = {"nll": [], "hit": [], "kl": []}
        for t in range(1, 12):
            if scored[n, t]:
                wanted["nll"].append(-float(q[n, t - 1, tokens[n, t]]))
                wanted["hit"].append(float(q[n, t - 1].argmax() == tokens[n, t]))
                wanted["kl"].append(float((p[n, t - 1].exp() * (p[n, t - 1] - q[n, t - 1])).sum()))
        for metric, values in wanted.items():
            assert found[metric][n] == pytest.approx(np.mean(values) if values else 0.0, abs=1e-5)


def test_masks_may_live_on_another_device():
    """The device of the scores decides nothing; a meta mask would fail if it were used as it is."""
    scores = scoring.TokenScores(*(torch.ones(3) for _ in range(3)))
    moved = []

    class Mask:
        def cpu(self):
            moved.append(True)
            return torch.tensor([[False, True, True], [False, False, True]])

    assert scores.per_sequence(Mask())["nll"].tolist() == [1.0, 1.0]
    assert moved


def test_an_absurd_loss_still_fits_into_a_file():
    assert np.isfinite(quality(5_000.0, 1.0).perplexity)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimate(rng.normal(3.0, 2.0, 60))
        assert found.low < found.mean < found.high
        covered += found.low <= 3.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_estimate_of_one_value_and_of_equal_values():
    assert estimate(np.array([0.25])).model_dump() == {"mean": 0.25, "low": 0.25, "high": 0.25, "count": 1}
    assert estimate(np.ones(50)).high == 1.0


def quality(nll, kl):
    values = {"text.nll": np.full(4, nll), "text.kl": np.full(4, kl)}
    return _quality(values | {f"{probe}.hit": np.ones(4) for probe in ("copy", "key_value", "needle")})


def test_recovered():
    models = {"base": quality(2.0, 0.0), "converted": quality(3.0, 0.8), "healed": quality(2.25, 0.2)}
    assert recovered(models) == {"kl": pytest.approx(0.75), "nll": pytest.approx(0.75)}
    models["converted"] = quality(2.0, 0.0)
    assert recovered(models) == {"kl": None, "nll": None}


def test_batches_stay_small_whatever_the_shape():
    assert scoring.batch_rows(256, 151_936, 4_096, 36) >= 1
    assert scoring.batch_rows(256, 1_024, 128, 8) == 32
    assert scoring.batch_rows(32_768, 151_936, 8_192, 80) == 1
