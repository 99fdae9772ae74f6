"""Measurements that outlive a kill: an analysis and a search go on where they were, and end with the same numbers."""

import contextlib
import json
import multiprocessing
import os
import signal

import pytest
import torch

from layerboost import analyze, passes, plan
from layerboost.artifacts import to_json
from layerboost.errors import EnvironmentTrouble, PlanError
from layerboost.measured import Measured, kept_beside, tensor_digest
from layerboost.passes import Scorer

ANALYSIS = analyze.Config(texts=6, answers=6, length=96, windows=[4, 16], estimators=[])
SEARCH = plan.Config(
    kv_reduction=0.5, context=128, measuring=plan.Measuring(texts=6, answers=4, length=64),
    at_least=plan.AtLeast(full_attention=1, no_attention=1),
)  # fmt: skip


def test_what_is_kept_is_there_again(tmp_path):
    kept = Measured(tmp_path / "kept", "model")
    kept[kept.key("text", ["F", "N"])] = {"kl": [0.1, 1 / 3, 1e-300]}
    again, other = Measured(tmp_path / "kept", "model"), Measured(tmp_path / "kept", "another model")
    assert again[again.key("text", ["F", "N"])] == {"kl": [0.1, 1 / 3, 1e-300]}
    assert again.key("text", ["N", "F"]) not in again
    assert other.key("text", ["F", "N"]) not in other


def test_lines_that_are_not_whole_are_passed_over(tmp_path):
    kept = Measured(tmp_path / "kept")
    for name in "abc":
        kept[name] = [name] * 3
    (path,) = (tmp_path / "kept").iterdir()
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        found = Measured(tmp_path / "kept")
        assert all(found[name] == [name] * 3 for name in "abc" if name in found)
        known = sum(name in found for name in "abc")
        assert known == whole[:end].count(b"]]")
        found["d"] = 1  # is not joined to what is unfinished
        assert Measured(tmp_path / "kept")["d"] == 1


def test_every_process_has_its_file_and_reads_all(tmp_path, monkeypatch):
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        kept = Measured(tmp_path / "kept")
        kept[f"by {rank}"] = rank
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["0.jsonl", "1.jsonl", "2.jsonl"]
    kept = Measured(tmp_path / "kept")
    assert [kept[f"by {rank}"] for rank in range(3)] == [0, 1, 2]


def test_they_go_when_they_are_not_needed_any_more(tmp_path):
    out = tmp_path / "sensitivity.json"
    for trouble, stays in ((None, False), (PlanError("no plan"), True), (KeyboardInterrupt(), True)):
        with contextlib.suppress(PlanError, KeyboardInterrupt), kept_beside(out) as kept:
            kept["a"] = 1
            assert (tmp_path / "sensitivity.json-measured").is_dir()
            if trouble is not None:
                raise trouble
        assert (tmp_path / "sensitivity.json-measured").exists() == stays  # other settings may need it
    with kept_beside(None) as kept:
        kept["a"] = 1


def test_a_folder_with_more_in_it_is_not_removed(tmp_path):
    with kept_beside(tmp_path / "plan.json") as kept:
        kept["a"] = 1
        (tmp_path / "plan.json-measured" / "thesis.txt").write_text("years of work")
        (tmp_path / "plan.json-measured" / "mine.jsonl").write_text('["b", 2]')
    assert {path.name for path in (tmp_path / "plan.json-measured").iterdir()} == {"thesis.txt", "mine.jsonl"}
    assert "b" not in Measured(tmp_path / "plan.json-measured")


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    kept = Measured(tmp_path / "file" / "kept")
    with pytest.raises(EnvironmentTrouble, match="cannot be written"):
        kept["a"] = 1


def test_digests_tell_values_and_shapes_apart():
    some = torch.arange(6)
    others = [some.reshape(2, 3), some.float(), some.flip(0), some[:5]]
    digests = {tensor_digest(one) for one in (some, *others)} | {tensor_digest(some, some)}
    assert len(digests) == 6
    assert tensor_digest(some.reshape(2, 3).T.contiguous().T) == tensor_digest(others[0])


def killed_while_writing(number, work):
    """In a process of its own: dies in the middle of writing its `number`-th measurement."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    real, written = Measured.__setitem__, []

    def put(kept, key, value):
        written.append(key)
        if len(written) == number:
            kept.folder.mkdir(exist_ok=True)
            with open(kept.folder / "0.jsonl", "ab") as file:
                file.write(b'\n["unfinished", {"text.kl": [0.')
            os.kill(os.getpid(), signal.SIGKILL)
        real(kept, key, value)

    Measured.__setitem__ = put
    work()


def die(number, work):
    child = multiprocessing.get_context("fork").Process(target=killed_while_writing, args=(number, work))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def small_batches(monkeypatch):
    """So that there is something between two measurements; and every layer that runs is counted."""
    monkeypatch.setattr(passes, "batch_rows", lambda *_: 2)
    counted = []
    real = Scorer._group

    def group(self, group, plans):
        counted.append(len(plans))
        return real(self, group, plans)

    monkeypatch.setattr(Scorer, "_group", group)
    return counted


def content(artifact):
    found = json.loads(to_json(artifact))
    for informative in ("provenance", "costs", "measured"):
        found.pop(informative, None)
    return found


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_an_analysis_goes_on_after_kill_9(tiny, tmp_path, monkeypatch):
    counted, out = small_batches(monkeypatch), tmp_path / "sensitivity.json"
    wanted = analyze.run(tiny, ANALYSIS)
    whole = sum(counted)
    batches, plans = 3 * 4, 1 + 4 * 3  # text and three probes; untouched, and three mixers in each of four layers
    assert whole == batches * plans
    for number in (1, 40, 70):  # of what is left
        die(number, lambda: analyze.run(tiny, ANALYSIS, out=out))
        assert not out.exists()
    counted.clear()
    found = analyze.run(tiny, ANALYSIS, out=out)
    assert sum(counted) == whole - 0 - 39 - 69
    assert content(found) == content(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["sensitivity.json"]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_search_goes_on_after_kill_9(tiny, tmp_path, monkeypatch):
    sensitivity = analyze.run(tiny, ANALYSIS)
    counted, out = small_batches(monkeypatch), tmp_path / "plan.json"
    wanted = plan.run(sensitivity, SEARCH, model=tiny)
    whole = sum(counted)
    for number in (30, 45):
        die(number, lambda: plan.run(sensitivity, SEARCH, model=tiny, out=out))
    counted.clear()
    found = plan.run(sensitivity, SEARCH, model=tiny, out=out)
    assert sum(counted) == whole - 29 - 44
    assert content(found) == content(wanted)
    assert found.measured["loss"] == wanted.measured["loss"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_other_settings_find_nothing_of_theirs(tiny, tmp_path, monkeypatch):
    counted, out = small_batches(monkeypatch), tmp_path / "sensitivity.json"
    other = ANALYSIS.model_copy(update={"seed": 1})
    wanted = analyze.run(tiny, other)
    whole = sum(counted)
    die(60, lambda: analyze.run(tiny, ANALYSIS, out=out))
    counted.clear()
    assert content(analyze.run(tiny, other, out=out)) == content(wanted)
    assert sum(counted) == whole
