"""Files are written whole or not at all, say what is wrong with them, and have one writer."""

import errno
import json
import multiprocessing
import os
import signal
import time

import pytest

from layerboost import artifacts
from layerboost.artifacts import (
    CurvePoint,
    Plan,
    check_output_file,
    intact,
    load,
    lock,
    publish_folder,
    read_json,
    recorded_inputs,
    write_text,
)
from layerboost.errors import EnvironmentTrouble, PlanError, UsageError


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def write_folder(final, text="hello", inputs=None):
    with publish_folder(final, inputs) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text(text)


def test_a_folder_appears_whole(tmp_path):
    write_folder(tmp_path / "out", inputs={"model": "abc"})
    assert files(tmp_path) == ["out/manifest.json", "out/sub/a.txt"]
    assert recorded_inputs(tmp_path / "out") == {"model": "abc"}
    assert intact(tmp_path / "out", deep=True)


def test_files_of_a_folder_may_be_read_by_whom_others_may(tmp_path):
    with publish_folder(tmp_path / "out") as partial:
        (partial / "model.safetensors").write_bytes(b"")
        (partial / "model.safetensors").chmod(0o600)
        (partial / "other").write_bytes(b"")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode == (tmp_path / "out" / "other").stat().st_mode
    (tmp_path / "usual").write_bytes(b"")
    assert (tmp_path / "out" / "other").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_lock_leaves_no_folder_behind_when_nothing_came(tmp_path):
    with lock(tmp_path / "steps"):
        pass
    assert not (tmp_path / "steps").exists()
    with lock(tmp_path / "steps"):
        (tmp_path / "steps" / "state").touch()
    assert (tmp_path / "steps" / "state").exists()


@pytest.mark.parametrize("what", ["folder", "device"])
def test_what_is_no_file_is_never_replaced(tmp_path, what):
    path = tmp_path / "place"
    if what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)  # which any user may make
    with pytest.raises(EnvironmentTrouble, match="name a file"):
        write_text(path, "x")
    with pytest.raises(UsageError, match=r"is no plan.json of layerboost; name another --out, or remove it"):
        check_output_file(path, Plan)
    assert path.is_dir() or path.is_fifo()


def test_a_failure_leaves_nothing_and_keeps_what_was(tmp_path):
    def fail():
        with publish_folder(tmp_path / "out") as partial:
            (partial / "a.txt").write_text("half")
            raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert files(tmp_path) == []
    write_folder(tmp_path / "out", "first")
    with pytest.raises(ValueError, match="on purpose"):
        fail()
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "first"
    write_folder(tmp_path / "out", "second")
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "second"
    assert files(tmp_path) == ["out/manifest.json", "out/sub/a.txt"]


def test_what_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("ten years of work")
    with pytest.raises(UsageError, match="was not written by layerboost"):
        write_folder(tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file; name a folder"):
        write_folder(tmp_path / "file")
    assert files(tmp_path) == ["file", "out/thesis.tex"]
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty")


def test_a_manifest_of_someone_else_does_not_make_a_folder_ours(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "my web app"}')
    with pytest.raises(UsageError, match="was not written by layerboost"):
        write_folder(tmp_path / "out")
    write_folder(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("added later")
    with pytest.raises(UsageError, match="was not written by layerboost"):
        write_folder(tmp_path / "mine")


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for text in ("first", "second"):
        write_folder(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "sub" / "a.txt").read_text() == text


def test_leftovers_of_a_killed_writer_are_cleared(tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "stale.txt").write_text("stale")
    write_folder(tmp_path / "out")
    assert files(tmp_path) == ["out/manifest.json", "out/sub/a.txt"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "manifest"])
def test_damage_is_noticed(tmp_path, damage):
    out = tmp_path / "out"
    write_folder(out)
    if damage == "truncate":
        (out / "sub" / "a.txt").write_text("hell")
    elif damage == "remove":
        (out / "sub" / "a.txt").unlink()
    elif damage == "flip":
        (out / "sub" / "a.txt").write_text("hellO")
    else:
        (out / "manifest.json").write_text("{")
    assert not intact(out, deep=True)
    assert intact(out) == (damage == "flip")  # sizes alone do not see it


def test_a_full_disk_is_said_and_leaves_what_was(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "first")
    write_folder(tmp_path / "out", "first")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifacts.os, "fsync", full)
    with pytest.raises(EnvironmentTrouble, match=r"a.json cannot be written: No space left.*free some space"):
        write_text(tmp_path / "a.json", "second")
    with pytest.raises(EnvironmentTrouble, match="No space left"):
        write_folder(tmp_path / "out", "second")
    assert files(tmp_path) == ["a.json", "out/manifest.json", "out/sub/a.txt"]
    assert (tmp_path / "a.json").read_text() == "first"
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "first"


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(EnvironmentTrouble, match="cannot be written"):
        write_text(tmp_path / "file" / "a.json", "text")
    with pytest.raises(EnvironmentTrouble, match="it is a folder"):
        write_text(tmp_path, "text")
    with pytest.raises(EnvironmentTrouble, match="cannot be written"):
        write_folder(tmp_path / "file" / "out")


def _hold(folder, ready):
    with lock(folder):
        ready.set()
        time.sleep(60)


def test_one_writer_and_a_dead_one_does_not_count(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready))
    other.start()
    assert ready.wait(20)
    with pytest.raises(EnvironmentTrouble, match="is being written by another layerboost process"), lock(tmp_path):
        pass
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON: line 1, column 1"),
        ('{"schema": 1,\n "layers": [}', "is not JSON: line 2, column 13"),
        ("[]", "must hold one JSON object, found list"),
        ("\ud800", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"schema": ' + "9" * 5_000 + "}", "cannot be read"),
    ],
)
def test_files_that_are_not_json(tmp_path, text, message):
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PlanError, match=message):
        read_json(tmp_path / "a.json", PlanError)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UsageError, match="is a folder"):
        read_json(tmp_path)


def test_numbers_that_are_not_finite_are_refused():
    point = {"step": 0, "tokens": 0, "nll": 1.0, "recall": 0.5, "recall_kl": 0.1}
    with pytest.raises(ValueError, match="finite"):
        CurvePoint(**point, kl=float("nan"))


def test_unknown_keys_deep_inside_are_errors_with_a_hint(tmp_path):
    raw = {"schema": 1, "layers": [{"mixer": "full_attention"}], "model": {
        "name": "x", "digest": "y", "num_layers": 1, "native_windows": [None], "context": 9,
        "kv_shape": {"num_key_value_heads": 1, "head_dim": 1, "bytes_per_valu": 1}}}  # fmt: skip
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(
        PlanError, match=r"unknown key model.kv_shape.bytes_per_valu; did you mean model.kv_shape.bytes_per_value\?"
    ):
        load(Plan, tmp_path / "plan.json")
    raw["model"]["kv_shape"] = {"num_key_value_heads": 1, "head_dim": 1, "bytes_per_value": 1, "head_dims": 1}
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    with pytest.raises(
        PlanError, match=r"unknown key model.kv_shape.head_dims; did you mean model.kv_shape.head_dim\?"
    ):
        load(Plan, tmp_path / "plan.json")
