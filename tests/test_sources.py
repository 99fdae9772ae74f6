"""Training rows: how documents are laid out in them, and every kind of source they come from."""

import copy
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from layerboost.artifacts import validate
from layerboost.data import samples
from layerboost.data.corpus import open_corpus, standard_library
from layerboost.data.sequences import Sequences, Wanted, fill_rows
from layerboost.data.sources import Source, chat_rows, sources_digest
from layerboost.errors import DataError, EnvironmentTrouble, UsageError
from layerboost.model.loading import find_model, load_tokenizer
from tests.tiny import tokenizer

TEMPLATE = """{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MARKED = """{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}{% generation %}
{{- message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}
{{- '\n' }}{% endfor %}"""
CHATS = [
    [("user", "hello"), ("assistant", "hi there")],
    [("system", "be short"), ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")],
    [("user", "no answer")],
]


def training_rows(sources=None, corpus=None, tok=None, rows=20, length=64, seed=0, **more):
    if sources is not None:
        sources = [Source(**source) for source in sources]
    return samples.training_rows(
        corpus or standard_library(), tok or tokenizer(), 258, rows=rows, length=length, seed=seed, sources=sources,
        **more,
    )  # fmt: skip


def with_template(template):
    made = copy.deepcopy(tokenizer())
    made.chat_template = template
    return made


def write_rows(path: Path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_chats(path, chats=CHATS):
    return write_rows(path, [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats])


def text_of(rows: Sequences):
    return [tokenizer().decode(row) for row in rows.tokens]


def rows_of(found: Sequences):
    """Per row: tokens, scored and positions, which are never None here."""
    nothing = Sequences(found.tokens[:0], found.scored[:0], found.tokens[:0])
    found = Sequences.concatenate([nothing, found])
    return zip(found.tokens.tolist(), found.scored.tolist(), found.positions.tolist(), strict=True)


# --- layout -----------------------------------------------------------------------------------------------------------

# token 1_000 * d + j is token j of document d
LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=12)


def documents(lengths):
    return [(1_000 * d + np.arange(n), np.ones(n, dtype=bool)) for d, n in enumerate(lengths)]


def worth(given_documents, length):
    """Rows of the documents laid end to end in which a token follows another of its document."""
    flat = np.concatenate([ids for ids, _ in given_documents])
    rows = flat[: len(flat) // length * length].reshape(-1, length).tolist()
    return [row for row in rows if any(b == a + 1 for a, b in itertools.pairwise(row))]


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 30), st.integers(1, 40), st.integers(0, 3))
@example([2, 1, 1], 2, 2, 0)  # whose second order makes no row
def test_packed_rows_never_mix_documents(lengths, length, rows, seed):
    if not worth(documents(lengths), length):
        return
    found = fill_rows(documents(lengths), "x", Wanted(rows, length, True, seed))
    assert found.tokens.shape == (rows, length)
    for tokens, scored, places in rows_of(found):
        run = 0
        for at, token in enumerate(tokens):
            # the same document goes on if the token before is the one before it in that document
            run = run + 1 if at and token % 1_000 and tokens[at - 1] == token - 1 else 0
            assert places[at] == run
            assert scored[at] == (run > 0)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 90), min_size=1, max_size=12), st.integers(2, 30))
def test_packed_rows_reassemble_into_the_documents(lengths, length):
    wanted = worth(documents(lengths), length)
    if wanted:
        assert fill_rows(documents(lengths), "x", Wanted(len(wanted), length, True, 0)).tokens.tolist() == wanted


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 30), st.integers(1, 40), st.integers(0, 3))
def test_padded_rows_hold_one_document_each(lengths, length, rows, seed):
    if not any(n > 1 for n in lengths):
        return
    found = fill_rows(documents(lengths), "x", Wanted(rows, length, False, seed))
    assert found.tokens.shape == (rows, length)
    for tokens, scored, places in rows_of(found):
        held = length - places.count(-1)
        assert places == [*range(held), *[-1] * (length - held)]
        assert scored == [False, *[True] * (held - 1), *[False] * (length - held)]
        document, start = divmod(tokens[0], 1_000)
        assert tokens[:held] == [tokens[0] + j for j in range(held)]
        assert start % length == 0
        assert held == min(length, lengths[document] - start)
        assert start == 0 or held >= length // 8


def test_whole_rows_need_no_positions():
    for pack in (True, False):
        assert fill_rows(documents([32, 64, 32]), "x", Wanted(9, 32, pack, 0)).positions is None
        assert fill_rows(documents([32, 60, 32]), "x", Wanted(9, 32, pack, 0)).positions is not None


def test_sequences_carry_positions():
    tokens = torch.arange(12).reshape(3, 4)
    plain = Sequences(tokens, tokens > 0)
    placed = Sequences(tokens, tokens > 0, torch.tensor([[0, 1, 0, 1]] * 3))
    assert plain[1:].positions is None
    assert Sequences.concatenate([plain, plain]).positions is None
    both = Sequences.concatenate([plain, placed])
    assert both.positions.tolist() == [[0, 1, 2, 3]] * 3 + [[0, 1, 0, 1]] * 3
    assert [len(batch) for batch in both.batches(4)] == [4, 2]
    assert torch.equal(torch.cat([batch.positions for batch in both.batches(4)]), both.positions)
    assert both[torch.tensor([5, 0])].positions.tolist() == [[0, 1, 0, 1], [0, 1, 2, 3]]


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def letters(tmp_path):
    """A text of nothing but a, and one of nothing but b."""
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(" ".join(letter * n for n in range(2, 246)))
    return [str(tmp_path / f"{letter}.txt") for letter in "ab"]


def test_weights_are_shares_of_the_rows(letters):
    sources = [{"kind": "text", "path": path, "weight": w} for path, w in zip(letters, (3, 0.5), strict=True)]
    rows = training_rows([*sources, {"kind": "probes", "weight": 1.5}], rows=103)
    kinds = Counter("a" if "aa" in text else "b" if "bb" in text else "probes" for text in text_of(rows))
    assert len(rows) == 103
    assert all(abs(kinds[k] - 103 * w / 5) <= 1 for k, w in {"a": 3, "b": 0.5, "probes": 1.5}.items())
    assert "bb" in " ".join(text_of(rows[:40])) or "bb" in " ".join(text_of(rows[80:]))  # the sources are mixed


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), st.integers(0, 9))
def test_rows_of_every_source_are_spread_evenly(counts, seed):
    order = samples.evenly(counts, seed)
    assert sorted(order) == list(range(sum(counts)))
    ends = np.cumsum(counts)
    source = np.searchsorted(ends, order, side="right")
    for start, end in itertools.combinations(range(len(order) + 1), 2):
        found = np.bincount(source[start:end], minlength=len(counts))
        fair = (end - start) * np.array(counts) / len(order)
        # of each source, up to two more or fewer than its share lie between two places; and of all of them, their sum
        assert (abs(found - fair) <= 2 + 2 * len(counts) * np.array(counts) / len(order) + 1e-9).all()


def test_rows_of_one_source_are_in_random_order():
    orders = [samples.evenly([200], seed) for seed in range(20)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 0.25
    assert len({tuple(order) for order in orders}) == 20


def test_rows_are_decided_by_the_seed(letters):
    sources = [{"kind": "text"}, {"kind": "text", "path": letters[0]}]
    one, two, other = (training_rows(sources, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, two.tokens)
    assert torch.equal(one.positions, two.positions)
    assert not torch.equal(one.tokens, other.tokens)


def test_without_sources_the_corpus_and_probes():
    shares = [{"kind": "text", "weight": 0.75}, {"kind": "probes", "weight": 0.25}]
    assert torch.equal(training_rows(probe_share=0.25).tokens, training_rows(shares).tokens)
    assert training_rows(probe_share=1).positions is None


def test_only_the_train_split_trains(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"<{n}>" * 9} for n in range(100)])
    corpus = open_corpus(Path(path))
    rows = " ".join(text_of(training_rows([{"kind": "text", "path": path}], rows=200, pack=False)))
    assert all(document.text in rows for document in corpus.split("train"))
    assert not any(d.text[:8] in rows for split in ("validation", "held_out") for d in corpus.split(split))


def test_padded_rows_of_text(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {n}"} for n in range(30)])
    rows = training_rows([{"kind": "text", "path": path}], rows=50, pack=False)
    assert (rows.tokens[:, 0] == tokenizer().eos_token_id).all()
    texts = {tokenizer().decode(row[1 : 64 - places.count(-1)]) for row, _, places in rows_of(rows)}
    assert texts == {document.text for document in open_corpus(Path(path)).split("train")}


# --- chats ------------------------------------------------------------------------------------------------------------


def written_out(chat, marked):
    """Characters, which are tokens here, and whether each is scored."""
    text, scored = "", []
    for role, content in chat:
        header, end = f"<{role}>", "\n"
        text += header + content + end
        answer = role == "assistant"
        scored += [False] * len(header) + [answer] * len(content) + [answer and not marked]
    return text, scored


def check_chats(rows, chats, marked, length):
    expected = {text[:length]: scored[:length] for text, scored in (written_out(chat, marked) for chat in chats)}
    for tokens, scored, positions in rows_of(rows):
        held = length - positions.count(-1)
        assert scored[:held] == expected[tokenizer().decode(tokens[:held])]
        assert not any(scored[held:])


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("length", [200, 30])
def test_only_the_assistant_is_scored(tmp_path, marked, length):
    source = Source(kind="chat", path=write_chats(tmp_path / "chats.jsonl"))
    tok = with_template(MARKED if marked else TEMPLATE)
    rows = chat_rows(source, tok, Wanted(5, length, False, 0))
    check_chats(rows, CHATS, marked, length)
    texts = {text[:10] for text in text_of(rows)}
    # nothing is scored in the last chat, nor in the first 30 tokens of the second
    assert texts == ({"<user>hell", "<system>be"} if length == 200 else {"<user>hell"})


@settings(max_examples=25, deadline=None)
@given(st.data(), st.booleans(), st.integers(0, 5))
def test_masks_of_any_conversation(tmp_path_factory, data, marked, seed):
    words = st.text("abc <>", max_size=12)
    # templates like to begin with someone who asks
    turn = st.tuples(st.sampled_from(["user", "assistant", "tool"]), words)
    chats = [
        [("user", f"{n}"), *chat, ("assistant", "end")]
        for n, chat in enumerate(data.draw(st.lists(st.lists(turn, max_size=5), min_size=1, max_size=4)))
    ]
    path = write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", chats)
    tok = with_template(MARKED if marked else TEMPLATE)
    rows = chat_rows(Source(kind="chat", path=path), tok, Wanted(4, 500, False, seed))
    check_chats(rows, chats, marked, 500)


def test_tokens_that_reach_into_an_answer_are_not_scored(tmp_path):
    tok = load_tokenizer(find_model("reference"))
    tok.chat_template = "{% for message in messages %}{{ message['role'] }}:\n{{ message['content'] }}{% endfor %}"
    tok.chat_template += "{% if add_generation_prompt %}assistant:\n{% endif %}"
    path = write_chats(tmp_path / "chats.jsonl", [[("user", "why "), ("assistant", "    return"), ("user", "so")]])
    rows = chat_rows(Source(kind="chat", path=path), tok, Wanted(1, 40, False, 0))
    words = [tok.decode(token) for token in rows.tokens[0]]
    (scored,) = rows.scored[0].nonzero(as_tuple=True)
    assert words[scored[0] - 1] == "\n   "  # the header's end, and the answer's beginning
    assert "".join(words[i] for i in scored) == " return"


def test_chats_are_packed_and_read_from_parquet(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl")
    parquet = tmp_path / "chats.parquet"
    datasets.Dataset.from_list([json.loads(line) for line in Path(path).read_text().splitlines()]).to_parquet(parquet)
    found = [
        training_rows([{"kind": "chat", "path": str(p)}], tok=with_template(TEMPLATE), rows=9) for p in (path, parquet)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert found[0].tokens.shape == (9, 64)
    assert found[0].scored.any(1).all()
    assert not found[0].scored[found[0].positions == 0].any()


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({"messages": []}, TEMPLATE, "chats.jsonl line 1: must be a JSON object with messages"),
        ({"messages": [{"role": "user"}]}, TEMPLATE, "line 1: must be a JSON object with messages"),
        ({"text": "x"}, TEMPLATE, "line 1: must be a JSON object with messages"),
        ([1], TEMPLATE, "line 1: must be a JSON object with messages"),
        (CHATS[0], None, "the tokenizer has no chat template, .*; save one with the model"),
        (
            CHATS[0],
            "{{ messages | length }}{% if add_generation_prompt %}!{% endif %}",
            "in another way once an answer is there",
        ),
        (
            CHATS[0],
            "{{ raise_exception('roles must alternate') }}",
            "line 1: the chat template cannot render it: roles",
        ),
        (CHATS[2], TEMPLATE, "chats .*chats.jsonl holds less than one sequence of 64 tokens"),
    ],
)
def test_chats_that_cannot_be_used(tmp_path, row, template, message):
    path = tmp_path / "chats.jsonl"
    write_chats(path, [row]) if isinstance(row, list) and row != [1] else write_rows(path, [row])
    with pytest.raises(DataError, match=message):
        training_rows([{"kind": "chat", "path": str(path)}], tok=with_template(template))


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", [{"text": f"row {n} " * 30, "n": n} for n in range(1_000)])
    return {"kind": "hub", "path": str(tmp_path / "data")}


def test_the_hub_is_read_as_far_as_needed_and_once(data_set, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = training_rows([data_set], cache=cache)
    kept = list(cache.iterdir())
    assert [path.suffix for path in kept] == [".jsonl"]
    assert len(kept[0].read_text().splitlines()) == 64
    assert {int(n) for n in re.findall(r"row (\d+) row", " ".join(text_of(first)))} < set(range(64))
    monkeypatch.setattr(datasets, "load_dataset", None)
    assert torch.equal(training_rows([data_set], cache=cache).tokens, first.tokens)
    with pytest.raises(DataError, match="cannot be read"):
        training_rows([data_set], rows=30, cache=cache)  # more tokens are other rows of the data set
    assert list(cache.iterdir()) == kept


def test_the_cache_is_the_users(data_set, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    training_rows([data_set])
    assert len(list((tmp_path / "xdg" / "layerboost").glob("hub-*.jsonl"))) == 1


def test_settings_of_the_hub_are_handed_on(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        return ({"body": f"text {n}"} for n in range(1_000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = {"kind": "hub", "path": "owner/name", "subset": "en", "split": "test", "column": "body", "revision": "v1"}
    training_rows([source], cache=tmp_path)
    assert asked == [(("owner/name", "en"), {"split": "test", "revision": "v1", "streaming": True})]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "nope"},
            "data set .* cannot be read: Bad split: nope.*; check its name, subset, split and revision",
        ),
        ({"subset": "nope"}, "data set .* cannot be read: BuilderConfig 'nope' not found"),
        ({"column": "nope"}, "data set .* has no text in column nope; name another of its columns: text, n"),
        ({"column": "n"}, "data set .* has no text in column n"),
    ],
)
def test_data_sets_that_cannot_be_read(data_set, tmp_path, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        training_rows([data_set | settings], cache=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_the_hub_needs_datasets(data_set, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentTrouble, match=r"kind hub needs datasets .*: pip install 'layerboost\[data\]'"):
        training_rows([data_set], cache=tmp_path)


# --- what the teacher writes ------------------------------------------------------------------------------------------


class Teacher:
    """Writes its seed, and counts what it is asked."""

    def __init__(self, most=99):
        self.calls, self.most = 0, most

    def __call__(self, prompts, new, seed):
        if self.calls == self.most:
            raise KeyboardInterrupt
        self.calls += 1
        return torch.cat([prompts, torch.full((len(prompts), new), 2 + seed % 256)], 1)


def test_the_teacher_writes_after_beginnings_of_text(tmp_path):
    corpus = standard_library()
    rows = training_rows([{"kind": "generated"}], rows=150, generate=Teacher(), cache=tmp_path)
    assert rows.tokens.shape == (150, 64)
    assert rows.positions is None
    assert not rows.scored[:, :8].any()
    assert rows.scored[:, 8:].all()
    assert Counter(rows.tokens[:, 8].tolist()) == {2: 64, 3: 64, 4: 22}  # every batch has a seed of its own
    train = "".join(document.text for document in corpus.split("train"))
    assert all(tokenizer().decode(row[1:8]) in train for row in rows.tokens[:20])


def test_what_the_teacher_wrote_is_kept(tmp_path):
    asked = {"sources": [{"kind": "generated"}], "rows": 150, "cache": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        training_rows(generate=Teacher(most=2), **asked)
    rest, nothing = Teacher(), Teacher()
    first = training_rows(generate=rest, **asked)
    assert rest.calls == 1
    assert torch.equal(training_rows(generate=nothing, **asked).tokens, first.tokens)
    assert nothing.calls == 0
    for other in ({"seed": 5}, {"length": 80}, {"teacher": "another"}):
        writes = Teacher()
        training_rows(generate=writes, **asked | other)
        assert writes.calls == 3
    damaged, again = next(tmp_path.glob("generated-*/tokens.safetensors")), Teacher()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    for other in ({}, {"seed": 5}, {"length": 80}, {"teacher": "another"}):
        training_rows(generate=again, **asked | other)
    assert again.calls == 1


def test_few_beginnings_are_used_again(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"text number {n}"} for n in range(9)])
    source = [{"kind": "generated", "path": path}]
    rows = training_rows(source, rows=40, generate=Teacher())
    prompts = Counter(tokenizer().decode(row[:8]) for row in rows.tokens)
    assert set(prompts) == {"<|end|>text nu"}
    with pytest.raises(DataError, match="its train split has no 100 tokens to begin with; give more text"):
        training_rows(source, length=800, generate=Teacher())
    with pytest.raises(UsageError, match="kind generated needs a teacher that writes"):
        training_rows(source)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "chat"}, "kind chat needs a path: a .jsonl or .parquet file"),
        ({"kind": "hub"}, "kind hub needs a path: a data set such as owner/name"),
        ({"kind": "probes", "path": "x"}, "kind probes takes no path; its keys are kind, weight"),
        ({"kind": "text", "split": "test"}, "kind text takes no split; its keys are kind, weight, path"),
        ({"kind": "text", "weight": 0}, "weight: must be greater than 0"),
        ({"kind": "texts"}, "kind: must be 'text', 'chat', 'hub', 'generated' or 'probes'"),
        ({"kind": "text", "wieght": 1}, "unknown key wieght; did you mean weight?"),
    ],
)
def test_sources_that_are_refused(raw, message):
    with pytest.raises(UsageError, match=message.replace("?", r"\?")):
        validate(Source, raw, "data", UsageError)


def test_a_source_in_full_reads_back():
    for kind in ("text", "probes", "generated"):
        source = Source(kind=kind)
        assert Source.model_validate(source.model_dump(mode="json")) == source


def test_no_source_and_no_file(tmp_path):
    with pytest.raises(UsageError, match="data names no source"):
        training_rows([])
    for kind, message in (("text", "text .*nowhere does not exist"), ("chat", "chats .*nowhere must be a .jsonl or")):
        with pytest.raises(DataError, match=message):
            training_rows([{"kind": kind, "path": str(tmp_path / "nowhere")}])


def test_a_tokenizer_of_another_model_is_noticed():
    with pytest.raises(DataError, match="does not belong to this model"):
        samples.training_rows(standard_library(), tokenizer(), 100, rows=4, length=64, seed=0)


def test_the_digest_knows_contents_and_settings(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    text, hub = Source(kind="text", path=str(tmp_path / "a.txt")), Source(kind="hub", path="owner/name")
    digests = {sources_digest([text, hub]), sources_digest([hub, text]), sources_digest([text])}
    changes = {"subset": "s", "split": "s", "column": "s", "revision": "s", "weight": 2, "path": "owner/other"}
    digests |= {sources_digest([text, hub.model_copy(update={key: value})]) for key, value in changes.items()}
    before = sources_digest([text])
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.txt").write_text("one")
    assert sources_digest([Source(kind="text", path=str(tmp_path / "moved" / "a.txt"))]) == before
    (tmp_path / "a.txt").write_text("two")
    digests.add(sources_digest([text]))
    assert len(digests) == 3 + len(changes) + 1
    with pytest.raises(DataError, match="does not exist"):
        sources_digest([Source(kind="text", path=str(tmp_path / "nowhere"))])


def test_a_part_of_the_text_brings_nothing_of_its_other_splits(tmp_path):
    """Of a small text each split is given something, which in a larger one is in the train split."""
    for part, count in (("notes", 3), ("prose", 300)):
        (tmp_path / part).mkdir()
        for n in range(count):
            (tmp_path / part / f"{n}.txt").write_text(f"{part} {n} " + " ".join(f"{part}{n}w{k}" for k in range(40)))
    corpus, outer = open_corpus(tmp_path / "notes"), open_corpus(tmp_path)
    others = {d.text for d in corpus.documents if corpus.splits[d.name] != "train"}
    assert others & {d.text for d in outer.split("train")}  # or there would be nothing to see
    path = write_rows(tmp_path / "hub" / "rows.jsonl", [{"text": d.text} for d in outer.split("train")])
    for source in ({"kind": "text", "path": str(tmp_path)}, {"kind": "hub", "path": str(Path(path).parent)}):
        rows = training_rows([source], corpus=corpus, rows=300, length=256, cache=tmp_path / "cache")
        written = " ".join(tokenizer().batch_decode(rows.tokens))
        seen = {d.text for d in outer.documents if " ".join(d.text.split()[:3]) + " " in written}
        assert len(seen) > 40
        assert not seen & others


def test_rows_repeat_only_where_all_was_had(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{n:05} " * 11 + "abcd"} for n in range(2_000)])
    for pack in (True, False):
        rows = training_rows([{"kind": "text", "path": path}], rows=600, pack=pack)
        assert len({tuple(row) for row in rows.tokens.tolist()}) == 600


def test_a_source_without_a_row_is_told(letters, capsys):
    training_rows([{"kind": "text", "path": letters[0], "weight": 0.01}, {"kind": "probes"}], rows=40)
    assert "data: kind text, weight 0.01, gets none of 40 rows" in capsys.readouterr().err


def test_chats_that_are_not_there_are_called_so(tmp_path):
    with pytest.raises(DataError, match=r"chats .*nowhere.jsonl must be a .jsonl or .parquet file"):
        sources_digest([Source(kind="chat", path=str(tmp_path / "nowhere.jsonl"))])
