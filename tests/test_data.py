"""Corpus, sequences and probes: what is in them, and what must never be."""

import json
import sys
import sysconfig
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layerboost.data.corpus import open_corpus, split_of, standard_library
from layerboost.data.probes import PROBES, ProbeMaker, as_pairs, ordinary_tokens, probe_sequences
from layerboost.data.samples import recall_pairs, samples, training_rows
from layerboost.data.sequences import beginning, text_sequences, token_stream
from layerboost.errors import DataError, EnvironmentTrouble
from tests.tiny import BEGIN, beginning_tokenizer, tokenizer

SPLITS = ("train", "validation", "held_out")


def maker(seed=0, words=200):
    rng = np.random.default_rng(seed)
    return ProbeMaker(np.arange(10, 10 + words), rng.integers(2, 1_000, 20_000), rng)


def test_the_standard_library_without_tests_and_packages():
    corpus = standard_library()
    names = [document.name for document in corpus.documents]
    assert len(names) > 300
    assert "json/decoder.py" in names
    assert not [
        n for n in names if Path(n).is_absolute() or {"site-packages", "test", "tests", "idlelib"} & set(n.split("/"))
    ]
    assert names == sorted(names, key=Path)
    text = (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text(encoding="utf-8")
    assert next(d.text for d in corpus.documents if d.name == "json/decoder.py") == text


def test_splits_cover_everything_once_and_depend_on_the_name_alone():
    corpus = standard_library()
    parts = {split: {d.name for d in corpus.split(split)} for split in SPLITS}
    assert sum(map(len, parts.values())) == len(corpus.documents)
    assert set.union(*parts.values()) == {d.name for d in corpus.documents}
    assert all(len(part) > 10 for part in parts.values())
    assert all(split_of(name) == split for split, names in parts.items() for name in names)


def test_the_digest_notices_every_change(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(f"one two three {name}")
    first = open_corpus(tmp_path).digest
    assert open_corpus(tmp_path).digest == first
    (tmp_path / "a.txt").write_text("one two thre a")
    assert open_corpus(tmp_path).digest != first


def test_users_own_text(tmp_path):
    (tmp_path / "sub").mkdir()
    long = " ".join(str(n * n) for n in range(10_000))
    (tmp_path / "sub" / "long.txt").write_text(long)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"row {n}"}) for n in range(5)) + "\n")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00\x80")
    corpus = open_corpus(tmp_path)
    texts = [d.text for d in corpus.documents]
    assert texts[:5] == [f"row {n}" for n in range(5)]
    assert "".join(texts[5:]) == long
    assert {len(text) for text in texts[5:-1]} == {4_096}
    assert open_corpus(tmp_path / "rows.jsonl").documents[3].text == "row 3"
    assert all(corpus.split(split) for split in SPLITS)


def test_texts_that_come_twice_are_one_document(tmp_path):
    rows = [f"row {n % 5}\u2028" for n in range(20)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows))
    (tmp_path / "c.txt").write_text("row 1\u2028")
    (tmp_path / "d").mkdir()
    for name in ("c.txt", "d/e.txt"):
        (tmp_path / name).write_text("a licence" if name == "d/e.txt" else "row 1\u2028")
    assert [d.text for d in open_corpus(tmp_path).documents] == [*rows[:5], "a licence"]


def test_a_text_is_in_the_same_split_wherever_it_stands(tmp_path):
    for folder in ("a", "b/c"):
        (tmp_path / folder).mkdir(parents=True)
        for n in range(200):
            (tmp_path / folder / f"{n if folder == 'a' else 1000 - n}.txt").write_text(f"text {n}")
    rows = [json.dumps({"text": f"text {n}"}) for n in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(reversed(rows)))
    found = [open_corpus(tmp_path / name) for name in (".", "a", "b", "b/c", "rows.jsonl")]
    for split in SPLITS:
        whole, *parts = ({d.text for d in corpus.split(split)} for corpus in found)
        assert all(part <= whole for part in parts)
        assert all(parts)
        assert len(whole) < 300


def test_halves_of_characters_are_replaced(tmp_path):
    rows = [json.dumps({"text": f"row {n}, half \ud83d of one, all of \U0001f600"}) for n in range(9)]
    assert "\\ud83d of one, all of \\ud83d\\ude00" in rows[0]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    corpus = open_corpus(tmp_path)
    assert corpus.documents[3].text == "row 3, half \ufffd of one, all of \U0001f600"
    assert len(tokenizer()(corpus.documents[3].text)["input_ids"]) > 20


def test_parquet_is_read_like_jsonl(tmp_path):
    rows = [{"text": f"row {n}", "other": n} for n in range(9)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet, jsonl = (open_corpus(tmp_path / f"rows.{kind}").documents for kind in ("parquet", "jsonl"))
    assert [d.text for d in parquet] == [d.text for d in jsonl] == [row["text"] for row in rows]


def test_parquet_that_cannot_be_used(tmp_path, monkeypatch):
    datasets.Dataset.from_list([{"other": "row"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet has no column text; its columns are other"):
        open_corpus(tmp_path)
    datasets.Dataset.from_list([{"text": 1}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows.parquet row 1: must be a JSON object with a string under the key text"):
        open_corpus(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(DataError, match=r"rows.parquet cannot be read as parquet: "):
        open_corpus(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentTrouble, match=r"pip install 'layerboost\[data\]'"):
        open_corpus(tmp_path)


def test_text_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no UTF-8 text"):
        open_corpus(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(DataError, match="line 2: must be a JSON object with a string under the key text"):
        open_corpus(tmp_path)
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"bad.jsonl cannot be read: .*; it must be UTF-8 with one JSON object a line"):
        open_corpus(tmp_path)


def test_files_that_are_no_text_are_left_out_aloud_and_once(tmp_path, capfd):
    for n in range(400):  # that every split gets one is a matter of names
        (tmp_path / f"{n}.txt").write_text(f"some text {n}")
    (tmp_path / "empty.txt").touch()
    open_corpus(tmp_path)
    assert "left out" not in capfd.readouterr().err
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    assert len(open_corpus(tmp_path).documents) == len(open_corpus(tmp_path).documents) == 400
    said = capfd.readouterr().err
    assert said.count("4 of 405 files hold no UTF-8 text and are left out: a.png, b.png, c.png, ...") == 1


def test_everything_begins_as_the_tokenizer_begins_texts():
    begins = beginning_tokenizer()
    assert (beginning(begins), beginning(tokenizer())) == (BEGIN, None)
    found = samples(standard_library(), begins, 258, split="train", texts=8, answers=8, length=96, distance=40)
    for sequences in found.values():
        assert sequences.tokens.shape == sequences.scored.shape == (8, 96)
        assert (sequences.tokens[:, 0] == BEGIN).all()
        assert not sequences.scored[:, 0].any()
    for tokens, scored in zip(found["key_value"].tokens.tolist(), found["key_value"].scored.tolist(), strict=True):
        at = scored.index(True)
        before = [i for i in range(1, at - 1) if tokens[i] == tokens[at - 1]]
        assert any(tokens[i + 1] == tokens[at] and at - i - 1 >= 40 for i in before)
    for pack in (True, False):
        rows = training_rows(standard_library(), begins, 258, rows=24, length=64, seed=0, pack=pack)
        starts = torch.zeros_like(rows.scored) if rows.positions is None else rows.positions == 0
        starts[:, 0] = True
        assert (rows.tokens[starts] == BEGIN).all()
        assert not rows.scored[starts].any()
        assert (rows.tokens[~starts] != BEGIN).any()


def test_hidden_files_and_marks_of_byte_order_are_no_text(tmp_path):
    rows = [json.dumps({"text": f"row {n}"}) for n in range(400)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8-sig")
    for name in (".git/config", ".hidden.txt", "folder/.cache/page.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("of nobody")
    assert [document.text for document in open_corpus(tmp_path).documents] == [f"row {n}" for n in range(400)]


def test_tiny_text_says_what_is_missing(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"only a little text {name}")
    with pytest.raises(DataError, match="split holds 0 sequences of 96 tokens"):
        samples(
            open_corpus(tmp_path), tokenizer(), 258, split="train", texts=4, answers=4, length=96, distance=40
        )  # fmt: skip
    with pytest.raises(DataError, match="less than one sequence of 96 tokens"):
        training_rows(open_corpus(tmp_path), tokenizer(), 258, rows=4, length=96, probe_share=0.5, seed=0)


def test_a_tokenizer_of_another_model_is_noticed():
    with pytest.raises(DataError, match="does not belong to this model"):
        samples(standard_library(), tokenizer(), 100, split="train", texts=4, answers=4, length=96, distance=40)


def test_streams_repeat_and_respect_their_limit():
    documents = standard_library().split("validation")
    one, two = (token_stream(documents, tokenizer(), tokens=5_000, piece=500, seed=3) for _ in range(2))
    assert len(one) == 5_000
    assert (one == two).all()
    assert not (one == token_stream(documents, tokenizer(), tokens=5_000, piece=500, seed=4)).all()
    sequences = text_sequences(documents, tokenizer(), count=7, length=50, seed=0)
    assert sequences.tokens.shape == sequences.scored.shape == (7, 50)
    assert not sequences.scored[:, 0].any()
    assert sequences.scored[:, 1:].all()


def answer_of(row, scored, probe):
    """What someone who reads the sequence would answer at each scored place; None where the context does not say."""
    row = row.tolist()
    found = {}
    for at in np.flatnonzero(scored):
        back = {"copy": 3, "key_value": 1, "needle": 2}[probe]
        seek = row[at - back : at]
        earlier = [j for j in range(at - back) if row[j : j + back] == seek and j + back < at]
        if probe == "key_value":  # keys and values alternate, counted from the end
            earlier = [j for j in earlier if (at - 1 - j) % 2 == 0]
        found[int(at)] = {row[j + back] for j in earlier}
    return found


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(PROBES)), st.integers(64, 300), st.data())
def test_every_answer_stands_in_the_context_beyond_the_distance(probe, length, data):
    distance = data.draw(st.one_of(st.none(), st.integers(1, length - 24)))
    sequences = probe_sequences(maker(data.draw(st.integers(0, 99))), probe, count=2, length=length, distance=distance)
    for tokens, scored in zip(sequences.tokens.numpy(), sequences.scored.numpy(), strict=True):
        assert len(tokens) == length
        assert scored.any()
        if distance is not None:
            first = int(np.flatnonzero(scored)[0])
            assert scored[first:].all()  # one answer, at the end
            width = length - first
            starts = [j for j in range(first) if (tokens[j : j + width] == tokens[first:]).all() and j + width <= first]
            key = {"copy": 0, "key_value": 1, "needle": 2}[probe]
            starts = [j for j in starts if (tokens[j - key : j] == tokens[first - key : first]).all()]
            if probe == "key_value":
                starts = [j for j in starts if (first - j) % 2 == 0]
            assert starts
            assert first - max(starts) >= distance
        elif probe == "copy":
            period = int(np.flatnonzero(scored)[0]) - 1
            assert (tokens[period:] == tokens[:-period]).all()
        else:
            for at, answers in answer_of(tokens, scored, probe).items():
                assert int(tokens[at]) in answers


def test_pairs():
    sequences = probe_sequences(maker(), "needle", count=3, length=128, distance=60)
    for pair, tokens in zip(as_pairs(sequences), sequences.tokens.tolist(), strict=True):
        assert pair["prompt"] + pair["answer"] == tokens
        assert len(pair["answer"]) == 2


def test_pairs_for_any_tokenizer():
    for pair in recall_pairs(tokenizer(), 258, "key_value", count=3):
        assert len(pair["prompt"]) + len(pair["answer"]) == 256
        assert max(pair["prompt"]) < 258


def test_every_split_of_small_text_has_something(tmp_path):
    for count in range(1, 12):
        (tmp_path / f"{count}.txt").write_text(f"only a little text {count}")
        if count < 3:
            with pytest.raises(DataError, match="need one each, so give more text"):
                open_corpus(tmp_path)
        else:
            corpus = open_corpus(tmp_path)
            assert all(corpus.split(split) for split in SPLITS)
            assert sum(len(corpus.split(split)) for split in SPLITS) == count


def test_impossible_probes_are_refused():
    with pytest.raises(DataError, match="distance 300 does not fit probes of 256 tokens"):
        probe_sequences(maker(), "copy", count=1, length=256, distance=300)
    with pytest.raises(DataError, match="at least 32"):
        probe_sequences(maker(), "copy", count=1, length=16, distance=None)
    with pytest.raises(DataError, match="ordinary tokens"):
        ordinary_tokens(tokenizer(), 12)


def test_words_are_ordinary_and_the_model_knows_them():
    words = ordinary_tokens(tokenizer(), 258)
    assert (words < 258).all()
    assert not set(words) & set(tokenizer().all_special_ids)
    assert all(any(c.isalnum() for c in tokenizer().decode([w])) for w in words)


def test_training_rows_are_as_many_as_asked_and_repeat_small_text(tmp_path):
    for n in range(40):
        (tmp_path / f"{n}.txt").write_text(f"document {n} " * 30)
    rows = training_rows(open_corpus(tmp_path), tokenizer(), 258, rows=400, length=96, probe_share=0.4, seed=0)
    assert rows.tokens.shape == (400, 96)
    again = training_rows(open_corpus(tmp_path), tokenizer(), 258, rows=400, length=96, probe_share=0.4, seed=0)
    assert torch.equal(rows.tokens, again.tokens)
    text = (rows.scored == (rows.positions > 0)).all(1)
    assert text.sum() == 240
    assert (rows.positions[~text] == torch.arange(96)).all()
    for share, count in ((0.0, 10), (1.0, 10), (0.4, 1)):
        assert (
            len(
                training_rows(open_corpus(tmp_path), tokenizer(), 258, rows=count, length=96, probe_share=share, seed=0)
            )
            == count
        )


def test_probes_that_are_measured_on_are_never_trained_on():
    corpus = standard_library()
    judged = samples(corpus, tokenizer(), 258, split="held_out", texts=2, answers=20, length=96, distance=40)
    seen = {tuple(row[:8].tolist()) for row in judged["copy"].tokens}
    for seed in range(20):
        rows = training_rows(corpus, tokenizer(), 258, rows=30, length=96, probe_share=1.0, seed=seed)
        assert not seen & {tuple(row[:8].tolist()) for row in rows.tokens}


def test_the_held_out_split_is_never_trained_or_planned_on():
    corpus = standard_library()
    held_out = token_stream(corpus.split("held_out"), tokenizer(), tokens=10**9, piece=10**9, seed=0)
    seen = {held_out[i : i + 64].tobytes() for i in range(len(held_out) - 64)}
    data = samples(corpus, tokenizer(), 258, split="train", texts=40, answers=2, length=128, distance=60)
    rows = training_rows(corpus, tokenizer(), 258, rows=200, length=128, probe_share=0.0, seed=0)
    windows = torch.cat([data["text"].tokens, rows.tokens])[:, 32:96].numpy()
    shared = sum(window.tobytes() in seen for window in windows)
    assert shared <= len(windows) // 50  # licence headers and the like stand in many files
