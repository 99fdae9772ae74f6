"""Plans that share their common beginnings against whole forward passes of the model, plan by plan."""

import dataclasses
import importlib
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from layerboost import passes
from layerboost.data.sequences import Sequences
from layerboost.errors import CheckpointError
from layerboost.model.loading import load_original
from layerboost.passes import Scorer, count_layers, enter, finals, tree
from tests.conftest import FAMILIES
from tests.tiny import FULL, NONE, linear, make_checkpoint, native_windows, some_tokens, window

WHY = dataclasses.replace(NONE, reason="it does nothing")
PLANS = [
    [FULL] * 4,
    [NONE, FULL, FULL, FULL],
    [FULL, FULL, FULL, window(5)],
    [FULL, NONE, window(3), FULL],
    [NONE, window(5), window(1), NONE],
    [NONE, FULL, FULL, FULL],
    [WHY, FULL, FULL, FULL],
    [NONE] * 4,
]


def whole(model, plan, tokens, mixers=None):
    with torch.no_grad(), model.mixed(dict(enumerate(plan)), mixers):
        return model.base_model(tokens).last_hidden_state


def no_forward_left(model):
    return not any("forward" in vars(layer) for layer in model.decoder_layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_finals_are_bit_equal_to_whole_passes(checkpoints, family):
    model = load_original(checkpoints[family])
    batches = [some_tokens(3, 40), some_tokens(2, 17, seed=1)]
    seen = []
    for b, p, final in finals(model, batches, PLANS):
        seen.append((b, p))
        assert torch.equal(final, whole(model, PLANS[p], batches[b]))
    assert seen == [(b, p) for b in range(2) for p in range(len(PLANS))]
    assert no_forward_left(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_attention_in_finals(checkpoints, family):
    """Close only: batched products of few rows depend on where memory lies."""
    model = load_original(checkpoints[family])
    free = [i for i, native in enumerate(native_windows(model.config, 4)) if native is None]
    tokens = some_tokens(2, 30)
    plans = []
    for at, mixer in ((free[:1], linear("lolcats", 5)), (free[-1:], linear("gla")), (free, linear("performer"))):
        plans.append([mixer if i in at else FULL for i in range(4)])
    plans.append([NONE if i not in free else linear("linear") for i in range(4)])
    for _, p, final in finals(model, [tokens], plans):
        torch.testing.assert_close(final, whole(model, plans[p], tokens))


def test_mixers_with_parameters_of_their_own(tiny):
    model, plan = load_original(tiny), [FULL, linear("lolcats", 5), NONE, FULL]
    with model.mixed({1: plan[1]}):
        mixer = model.own_mixers()[1]
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter))
    tokens = some_tokens(2, 30)
    ((_, _, found),) = finals(model, [tokens], [plan], mixers={1: mixer})
    torch.testing.assert_close(found, whole(model, plan, tokens, {1: mixer}))
    assert not torch.allclose(found, whole(model, plan, tokens))


def test_finals_beside_native_windows(tmp_path):
    folder = make_checkpoint(
        tmp_path, "qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=2, num_hidden_layers=4
    )
    model = load_original(folder)
    tokens = some_tokens(2, 30)
    plans = [*PLANS, *([window(5) if i == layer else FULL for i in range(4)] for layer in range(4))]
    for _, p, final in finals(model, [tokens], plans):
        assert torch.equal(final, whole(model, plans[p], tokens))


def test_every_layer_is_held_while_it_works_with_all_batches(tiny):
    model, held, ran = load_original(tiny), [], []

    class Resident:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            held.append(self.index)

        def __exit__(self, *_):
            held.append(None)

    for index, layer in enumerate(model.decoder_layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: ran.append((index, held[-1])))
    list(finals(model, [some_tokens(1, 8), some_tokens(2, 9)], PLANS, resident=Resident))
    assert held == [0, None, 1, None, 2, None, 3, None]
    assert len(ran) == 2 * count_layers(PLANS)
    assert all(index == now for index, now in ran)


def test_plans_form_a_tree():
    plans = [[FULL, FULL], [NONE, FULL], [NONE, window(4)], [FULL, FULL], [WHY, window(4)]]
    levels, leaves = tree(plans)
    assert levels == [[(0, FULL), (0, NONE)], [(0, FULL), (1, FULL), (1, window(4))]]
    assert leaves == [0, 1, 2, 0, 2]
    assert count_layers(plans) == 5
    assert count_layers([[FULL, window(4)], [FULL, window(5)], [FULL, window(4, sink=True)]]) == 4
    # what differs once stays apart, also where the layers above are alike again
    assert count_layers([[FULL] * 6, [NONE, *[FULL] * 5]]) == 12
    assert count_layers([[FULL] * 6, [*[FULL] * 5, NONE]]) == 7
    one_each = [[NONE if i == layer else FULL for i in range(6)] for layer in range(6)]
    assert count_layers([[FULL] * 6, *one_each]) == 6 + 6 + 5 + 4 + 3 + 2 + 1


def shift(_, args):
    return args[0] + 1, *args[1:]


def there_and_back(model):
    """What the last layer hands on is what came in."""
    for layer in model.decoder_layers[1:3]:
        layer.register_forward_pre_hook(lambda _, args: (-args[0], *args[1:]))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.decoder_layers[2].register_forward_pre_hook(shift),
        there_and_back,
        lambda model: model.decoder_layers[1].register_forward_hook(lambda _, __, out: out * 2),
        lambda model: model.decoder_layers[3].register_forward_hook(lambda _, __, out: out * 2),
        lambda model: model.base_model.register_forward_hook(
            lambda _, __, out: type(out)(last_hidden_state=out.last_hidden_state + 1)
        ),
        lambda model: setattr(model.base_model.config, "num_hidden_layers", 3),  # a layer that does not run
    ],
    ids=[
        "before a layer",
        "there and back",
        "after a layer",
        "after the last layer",
        "after the norm",
        "a layer left out",
    ],
)
def test_what_computes_between_its_layers_is_refused(tiny, change):
    model = load_original(tiny)
    entry = enter(model, some_tokens(2, 8))
    assert torch.equal(entry.hidden, model.get_input_embeddings()(some_tokens(2, 8)))
    change(model)
    with pytest.raises(CheckpointError, match="qwen3 computes something between its layers"):
        enter(model, some_tokens(2, 8))
    assert no_forward_left(model)


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (RuntimeError("no norm today"), CheckpointError),
        (KeyError("no norm today"), KeyError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    ],
)
def test_entering_leaves_nothing_behind_after_an_error(tiny, monkeypatch, trouble, told):
    model = load_original(tiny)
    tokens = some_tokens(2, 8)
    before = whole(model, PLANS[0], tokens)

    def fail(*_):
        raise trouble

    with monkeypatch.context() as patch:
        patch.setattr(type(model.final_norm), "forward", fail)
        with pytest.raises(told):
            enter(model, tokens)
    assert no_forward_left(model)
    assert torch.equal(whole(model, PLANS[0], tokens), before)


def some_data(*kinds):
    """Sequences by kind, of which about half the tokens count, and in one sequence the last alone."""
    found = {}
    for seed, (kind, rows, length) in enumerate(kinds):
        scored = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
        scored[:, 0], scored[0], scored[:, -1] = False, False, True
        found[kind] = Sequences(some_tokens(rows, length, seed), scored)
    return found


DATA = some_data(("text", 5, 24), ("copy", 3, 31), ("needle", 2, 9))


@torch.no_grad()
def slow_scores(model, plan, data):
    """Each sequence alone through the whole model, token by token in float64."""
    found = {}
    for kind, sequences in data.items():
        rows = []
        for tokens, scored in zip(sequences.tokens, sequences.scored, strict=True):
            teacher = model(tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
            with model.mixed(dict(enumerate(plan))):
                student = model(tokens[None], use_cache=False).logits[0].double().log_softmax(-1)
            at = scored[1:].nonzero()[:, 0]
            p, q, target = teacher[at], student[at], tokens[1:][at]
            hits = (q.argmax(-1) == target).tolist()
            nll, kl = -q.gather(-1, target[:, None]).mean(), (p.exp() * (p - q)).sum(-1).mean()
            rows.append((float(nll), np.mean(hits), float(kl), [*hits, False].index(False) / len(hits)))
        for name, values in zip(("nll", "hit", "kl", "lead"), zip(*rows, strict=True), strict=True):
            found[f"{kind}.{name}"] = np.array(values)
    return found


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        assert list(one) == list(other)
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite"])  # the latter two cap or scale their logits
def test_scores_are_those_of_whole_models_sequence_by_sequence(checkpoints, family):
    model = load_original(checkpoints[family])
    found = Scorer(model, DATA)(PLANS)
    assert_same(found, [slow_scores(model, plan, DATA) for plan in PLANS])
    assert {name: len(values) for name, values in found[0].items() if name.endswith("kl")} == {
        "text.kl": 5, "copy.kl": 3, "needle.kl": 2,
    }  # fmt: skip
    assert (found[1]["text.kl"] > 0).all()
    assert (found[0]["text.kl"] == 0).all()


@pytest.mark.parametrize(("rows", "room"), [(1, 2**30), (2, 2**30), (64, 1), (2, 1), (2, 3 * 48 * 32 * 4)])
def test_small_batches_and_chunks_give_the_same_numbers(tiny, monkeypatch, rows, room):
    model = load_original(tiny)
    wanted = Scorer(model, DATA)(PLANS)
    monkeypatch.setattr(passes, "batch_rows", lambda *_: rows)
    monkeypatch.setattr(passes, "_STREAM_BYTES", room)
    heard = []
    scorer = Scorer(model, DATA)
    assert_same(scorer(PLANS, lambda *_: heard.append(1)), wanted)
    assert_same(Scorer(model, DATA, resident=lambda _: nullcontext())(PLANS), wanted)  # all batches together
    assert len(scorer.batches) == sum(-(-len(sequences) // rows) for sequences in DATA.values())
    assert len(heard) == scorer.steps(len(PLANS)) == len(PLANS) * len(scorer.batches)


def tokens_through_layers(model):
    counted = []
    for layer in model.decoder_layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: counted.append(args[0].shape[:2].numel()))
    return counted


@pytest.mark.parametrize("rows", [2, 64])
def test_forwards_are_what_ran(tiny, monkeypatch, rows):
    monkeypatch.setattr(passes, "batch_rows", lambda *_: rows)
    model = load_original(tiny)
    counted, scorer = tokens_through_layers(model), Scorer(model, DATA)
    total = sum(sequences.tokens.numel() for sequences in DATA.values())
    assert scorer.tokens == total
    first = [[NONE, FULL, FULL, FULL], [FULL, FULL, FULL, NONE]]
    scorer(first)  # the untouched model, a whole pass beside it, and the last layer once more
    assert scorer.forwards == pytest.approx(1 + 1 + 1 / 4)
    scorer(first)
    assert scorer.forwards == pytest.approx(2.25)  # what is known is not measured again
    scorer([[FULL, NONE, FULL, FULL], [FULL, FULL, NONE, FULL]])
    assert scorer.forwards == pytest.approx(2.25 + 1 + 3 / 4)  # the untouched model is known, its layers are not kept
    scorer([[FULL] * 4])
    assert scorer.forwards == pytest.approx(4 + 1)
    assert sum(counted) == pytest.approx(scorer.forwards * 4 * total)


def test_forwards_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr(passes, "_STREAM_BYTES", 1)
    model = load_original(tiny)
    counted, scorer = tokens_through_layers(model), Scorer(model, DATA)
    scorer([[NONE, FULL, FULL, FULL], [FULL, FULL, FULL, NONE], [FULL] * 4])
    # one plan at a time, in the order of their labels; the first of them, which is it, beside the untouched model
    assert scorer.forwards == pytest.approx(1 + 1 + 1)
    assert sum(counted) == pytest.approx(scorer.forwards * 4 * scorer.tokens)


def test_processes_share_the_work(tiny, monkeypatch):
    """Each scores every second plan, and all get all answers."""
    model, shared = load_original(tiny), []
    alone = Scorer(model, DATA)(PLANS)
    for rank in range(2):
        others = [(i, alone[i]) for i in range(1 - rank, len(PLANS), 2)]
        monkeypatch.setattr(passes, "ranks", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(passes, "gather", lambda own, others=others: (shared.append(own), [own, others])[1])
        assert_same(Scorer(model, DATA)(PLANS), alone)
    assert [[i for i, _ in own] for own in shared] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_no_plans_no_work(tiny):
    scorer = Scorer(load_original(tiny), DATA)
    assert scorer([]) == []
    assert scorer.forwards == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_what_is_not_finite(tiny, value, where):
    model = load_original(tiny)
    with torch.no_grad():
        model.get_parameter(where).fill_(value)
    with pytest.raises(CheckpointError, match="the model computes logits that are not finite; check its weights"):
        Scorer(model, DATA)(PLANS[1:2])


@pytest.mark.parametrize("verb", ["analyze", "plan"])
def test_processes_take_their_devices_before_a_model_goes_there(tiny, monkeypatch, verb):
    """A model that is loaded before would be on the first GPU in every process."""
    module = importlib.import_module(f"layerboost.{verb}")
    called = []
    monkeypatch.setattr(module, "ranks", lambda: called.append("ranks") or (0, 1))
    monkeypatch.setattr(module, "pick_device", lambda name: called.append("device") or "cpu")

    def load(*args, **kwargs):
        called.append("model")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_original", load)
    run = partial(module.run, tiny) if verb == "analyze" else partial(module._model, module.Config(), tiny)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert called == ["ranks", "device", "model"]
