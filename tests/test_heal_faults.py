"""Healing under fire: kills, signals, full disks, values that are not finite, too little memory, several processes."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

from layerboost import artifacts, convert, heal
from layerboost.artifacts import Plan
from layerboost.errors import EnvironmentTrouble, TrainingError
from layerboost.heal import checkpoint, training
from layerboost.heal.checkpoint import save_step, steps
from layerboost.heal.student import Healer
from layerboost.model.loading import load_original
from tests.test_heal import LAYERS, OWN, SETTINGS, settings_with
from tests.tiny import FULL, NONE, make_checkpoint, window

KILLS = int(os.environ.get("LAYERBOOST_KILLS", "25"))


@pytest.fixture(scope="module")
def hybrid(tiny, tmp_path_factory):
    return convert.run(tiny, Plan(layers=LAYERS), out=tmp_path_factory.mktemp("faults") / "hybrid")


@pytest.fixture
def save_always(monkeypatch):
    """A state after every step."""
    monkeypatch.setattr(training, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(training, "_SAVE_SHARE", 0.0)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# -------------------------------------------------------------------------------------------------------- kill -9


def heal_telling(pipe, hybrid, teacher, out):
    """In a process of its own: heal, and tell of every step, and of every file of a state before it is written."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    real_step, real_write = training._Run._step, checkpoint._write

    def step(run, asked):
        found = real_step(run, asked)
        os.write(pipe, f"step {run.done + 1}\n".encode())
        return found

    def write(tensors, path):
        os.write(pipe, b"saving 0\n")
        real_write(tensors, path)

    training._Run._step, checkpoint._write = step, write
    heal.run(hybrid, teacher, SETTINGS, out=out)
    os.write(pipe, b"done 0\n")


def attempt(hybrid, teacher, out, rng, saving):
    """Start a healing and kill it, at any moment or while it saves; returns its last step, None if it was done."""
    read, write = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=heal_telling, args=(write, hybrid, teacher, out))
    child.start()
    os.close(write)
    last, saves = 0, 0
    wanted, deadline = rng.randint(1, 12), time.monotonic() + rng.uniform(0.05, 1.2)
    with open(read, buffering=1) as told:
        os.set_blocking(read, False)
        while child.is_alive():
            for line in told.readlines():
                kind, _, number = line.strip().partition(" ")
                last = int(number) if kind == "step" else last
                saves += kind == "saving"
            if (saves >= wanted) if saving else (time.monotonic() >= deadline):
                time.sleep(rng.uniform(0, 0.01) if saving else 0)
                os.kill(child.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        child.join()
        for line in told.readlines():
            last = int(line.split()[1]) if line.startswith("step") else last
    assert child.exitcode in (0, -signal.SIGKILL)
    return None if child.exitcode == 0 else last


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_kills_at_random_moments(tiny, hybrid, tmp_path, save_always):
    """Whenever it is killed, the same call goes on, loses no more than a step, and ends with the same bytes."""
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    seed = int(os.environ.get("LAYERBOOST_SEED", time.time_ns()))
    print(f"LAYERBOOST_SEED={seed}")
    rng, killed, finished = random.Random(seed), Counter(), 0
    folder = tmp_path / "parts-steps"
    while killed.total() < KILLS or killed["saving"] < 0.4 * KILLS or not finished:
        saving = killed["saving"] < 0.4 * KILLS and rng.random() < 0.6
        before = max((step for step, _ in steps(folder)), default=0)
        last = attempt(hybrid, tiny, tmp_path / "parts", rng, saving)
        if last is not None:
            killed["saving" if saving else "any"] += 1
            left = max((step for step, _ in steps(folder)), default=0)
            published = (tmp_path / "parts").exists()  # states are cleared after that, and a kill may come later still
            assert published or left >= max(before, last - 1), f"step {last} was done, the newest state is of {left}"
        if (tmp_path / "parts").exists():
            assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
            shutil.rmtree(tmp_path / "parts")
            shutil.rmtree(folder, ignore_errors=True)
            finished += 1
    print(dict(killed), f"{finished} finished")


def stop_after_six_steps(monkeypatch, hybrid, teacher, out, folder):
    """A healing that saved a state at every step, and was stopped after the sixth."""
    real = training.save_step

    def save_then_stop(folder, step, *args):
        real(folder, step, *args)
        if step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_step", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            heal.run(hybrid, teacher, SETTINGS, out=out, steps_folder=folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("trained.safetensors", "a bit"), ("best.safetensors", "cut off"), ("optimizer.safetensors", "gone"),
        ("state.json", "cut off"), ("manifest.json", "gone"),
    ],
)  # fmt: skip
def test_a_damaged_state_is_passed_over(tiny, hybrid, tmp_path, monkeypatch, save_always, name, damage):
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    stop_after_six_steps(monkeypatch, hybrid, tiny, tmp_path / "parts", tmp_path / "steps")
    assert sorted(path.name for path in (tmp_path / "steps").glob("step-*")) == ["step-000005", "step-000006"]
    newest = tmp_path / "steps" / "step-000006" / name
    data = bytearray(newest.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
        newest.write_bytes(data)
    elif damage == "cut off":
        newest.write_bytes(data[: len(data) // 2])
    else:
        newest.unlink()
    done = []
    real = training._Run._step
    monkeypatch.setattr(training._Run, "_step", lambda run, asked: done.append(run.done) or real(run, asked))
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts", steps_folder=tmp_path / "steps")
    assert done[0] == 5
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_states_of_other_settings_are_passed_over(tiny, hybrid, tmp_path, monkeypatch, save_always):
    other = settings_with(seed=1)
    heal.run(hybrid, tiny, other, out=tmp_path / "fresh")
    stop_after_six_steps(monkeypatch, hybrid, tiny, tmp_path / "beside", tmp_path / "steps")
    heal.run(hybrid, tiny, other, out=tmp_path / "beside", steps_folder=tmp_path / "steps")
    assert weights(tmp_path / "beside") == weights(tmp_path / "fresh")


def test_states_of_other_settings_make_room(tmp_path):
    """They would have higher step numbers, and be kept in place of the new ones."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones(2)
    optimizer.step()
    for step, inputs in ((500, {"a": "old"}), (600, {"a": "old"}), (50, {"a": "new"})):
        save_step(tmp_path, step, {"p": parameter}, {"p": parameter}, optimizer, {}, inputs)
    assert [step for step, _ in steps(tmp_path)] == [50]
    for step in (60, 70, 80):
        save_step(tmp_path, step, {"p": parameter}, {"p": parameter}, optimizer, {}, {"a": "new"})
    assert [step for step, _ in steps(tmp_path)] == [70, 80]
    assert {path.suffix for path in (tmp_path / "step-000080").iterdir()} == {".safetensors", ".json"}


def test_states_that_will_go_are_named(tiny, hybrid, tmp_path, monkeypatch, capsys):
    """So that nobody who forgot a setting finds out after hours that all began anew."""
    real = Healer.backward

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Healer, "backward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "healed")
    assert [step for step, _ in steps(tmp_path / "healed-steps")] == [1]
    shutil.copytree(tmp_path / "healed-steps", tmp_path / "same-steps")
    capsys.readouterr()
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "same")
    assert "going on from step 1 of 12" in "".join(capsys.readouterr())
    heal.run(hybrid, tiny, settings_with(rank=3), out=tmp_path / "healed")
    said = "states of a healing with other settings or data, at step 1; this one begins anew"
    assert said in "".join(capsys.readouterr())


# -------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("layers", "at", "number"),
    [
        pytest.param(LAYERS, 5, signal.SIGTERM, id="SIGTERM"),
        pytest.param(OWN, 2, signal.SIGINT, id="SIGINT in the transfer"),
        pytest.param(OWN, 9, signal.SIGTERM, id="SIGTERM after it"),
    ],
)
def test_an_interrupted_healing_ends_with_the_same_bytes(tiny, tmp_path, monkeypatch, layers, at, number):
    hybrid = convert.run(tiny, Plan(layers=layers), out=tmp_path / "hybrid")
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    seen = []

    def counted(step):
        def interrupted(self, *args):
            seen.append(step)
            if len(seen) == at:
                os.kill(os.getpid(), number)
            return step(self, *args)

        return interrupted

    for name in ("backward", "transfer"):
        monkeypatch.setattr(Healer, name, counted(getattr(Healer, name)))
    with pytest.raises(KeyboardInterrupt):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    stopped = len(seen)
    assert stopped == at  # the step that was under way is finished
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts")
    assert len(seen) == 12
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    curves = [json.loads((tmp_path / out / "healing.json").read_text())["curve"] for out in ("whole", "parts")]
    assert curves[0] == curves[1]
    learned = [name for name in load_file(tmp_path / "whole" / "model.safetensors") if ".mixer." in name]
    fresh, trained = (load_file(folder / "model.safetensors") for folder in (hybrid, tmp_path / "whole"))
    assert all(not torch.equal(fresh[name], trained[name]) for name in learned)
    assert all((trained[name] - fresh[name]).abs().max() > 0.1 for name in learned if name.endswith(".sink"))


# ------------------------------------------------------------------------------------------------ disk and memory


@pytest.mark.parametrize("full", ["at once", "while writing", "in the tensors"])
def test_a_full_disk_leaves_the_state_before_intact(tiny, hybrid, tmp_path, monkeypatch, save_always, full):
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    calls = []

    def fail(real, error):
        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) > 3 * (3 if full == "in the tensors" else 1):
                raise error
            return real(*args, **kwargs)

        return failing

    with monkeypatch.context() as patch:
        if full == "at once":
            usage = shutil.disk_usage(tmp_path)
            patch.setattr(
                shutil, "disk_usage",
                lambda _: usage if calls.append(1) or len(calls) < 4 else usage._replace(free=7),
            )  # fmt: skip
        elif full == "while writing":
            trouble = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            patch.setattr(artifacts, "_write_manifest", fail(artifacts._write_manifest, trouble))
        else:
            trouble = checkpoint.SafetensorError("No space left on device (os error 28)")
            patch.setattr(checkpoint, "save_file", fail(checkpoint.save_file, trouble))
        with pytest.raises(EnvironmentTrouble, match=r"needs (about )?\d|No space left on device; free some space"):
            heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts", steps_folder=tmp_path / "steps")
    assert not (tmp_path / "parts").exists()
    assert not list((tmp_path / "steps").glob(".*partial"))
    newest = checkpoint.newest(tmp_path / "steps", artifacts.recorded_inputs(steps(tmp_path / "steps")[-1][1]))
    assert newest == steps(tmp_path / "steps")[-1][1]
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "parts", steps_folder=tmp_path / "steps")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_what_kills_left_unfinished_goes_with_the_next_state(tiny, hybrid, tmp_path, monkeypatch, save_always):
    for step in (3, 99):
        (tmp_path / "steps" / f".step-{step:06}.partial").mkdir(parents=True)
    real, seen = checkpoint.save_step, []

    def saved(folder, *rest):
        real(folder, *rest)
        seen.append([path.name for path in folder.glob(".step-*")])

    monkeypatch.setattr("layerboost.heal.training.save_step", saved)
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out", steps_folder=tmp_path / "steps")
    assert seen[0] == []


def test_memory_that_runs_out_cuts_the_batch(tiny, hybrid, tmp_path, monkeypatch, capsys):
    """More than one sequence at a time does not fit: smaller passes, the same steps."""
    whole = heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    real, sizes = Healer.backward, []

    def small(self, batch, *rest):
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch))
        return real(self, batch, *rest)

    monkeypatch.setattr(Healer, "backward", small)
    found = heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "cut")
    said = " ".join(capsys.readouterr().err.split())
    assert "out of memory: 2 sequences at a time from now on, 4 per step as before" in said
    assert "out of memory: 1 sequences at a time" in said
    assert len(sizes) == 48
    assert [p.kl for p in found.curve] == pytest.approx([p.kl for p in whole.curve], rel=2e-3)
    monkeypatch.setattr(Healer, "backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(EnvironmentTrouble, match=r"out of memory with one sequence of 64 tokens; go on with gradient"):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "none")


def test_a_healing_goes_on_with_other_means(tiny, hybrid, tmp_path, monkeypatch, save_always):
    """Smaller passes, checkpointing and more skips change nothing that was learned: the state is gone on from."""
    stop_after_six_steps(monkeypatch, hybrid, tiny, tmp_path / "out", tmp_path / "steps")
    real, sizes = Healer.backward, []
    monkeypatch.setattr(
        Healer, "backward", lambda self, part, *rest: sizes.append(len(part)) or real(self, part, *rest)
    )
    other = settings_with(micro_batch=1, gradient_checkpointing=True, max_skipped=3)
    heal.run(hybrid, tiny, other, out=tmp_path / "out", steps_folder=tmp_path / "steps")
    assert sizes == [1] * 24


def test_a_micro_batch_that_is_asked_for_is_tried_again(tiny, hybrid, tmp_path, monkeypatch, save_always):
    """Memory ran out before; the same command goes on with less, and one that names a size gets it."""
    real, sizes = Healer.backward, []

    def small(self, batch, *rest):
        if len(batch) > 2:
            raise MemoryError
        return real(self, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Healer, "backward", small)
        stop_after_six_steps(patch, hybrid, tiny, tmp_path / "out", tmp_path / "steps")
    shutil.copytree(tmp_path / "steps", tmp_path / "again")
    monkeypatch.setattr(
        Healer, "backward", lambda self, part, *rest: sizes.append(len(part)) or real(self, part, *rest)
    )
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out", steps_folder=tmp_path / "steps")
    assert sizes == [2] * 12
    sizes.clear()
    heal.run(hybrid, tiny, settings_with(micro_batch=4), out=tmp_path / "other", steps_folder=tmp_path / "again")
    assert sizes == [4] * 6


def test_memory_that_runs_out_where_weights_are_shared_ends_it(tiny, hybrid, tmp_path, monkeypatch):
    """Processes cannot try again one by one: the others wait for this one's part of the weights."""
    monkeypatch.setattr(heal, "shard", lambda healer: None)
    monkeypatch.setattr(Healer, "backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(
        EnvironmentTrouble, match=r"out of memory with 4 sequences at a time.*set a smaller micro_batch"
    ):
        heal.run(hybrid, tiny, settings_with(shard=True), out=tmp_path / "out")


def test_other_errors_are_not_taken_for_memory(tiny, hybrid, tmp_path, monkeypatch):
    monkeypatch.setattr(Healer, "backward", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out")


# ------------------------------------------------------------------------------------------- numbers not finite


def break_at(monkeypatch, where, what):
    """Loss, or gradients, that are not finite at these calls."""
    real, calls = Healer.backward, []

    def broken(self, *args):
        calls.append(1)
        loss = real(self, *args)
        if len(calls) not in where:
            return loss
        if what == "loss":
            return loss * float("nan")
        next(p for p in self.parameters.values() if p.grad is not None).grad[0] = float("inf")
        return loss

    monkeypatch.setattr(Healer, "backward", broken)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped(tiny, hybrid, tmp_path, monkeypatch, capsys, what):
    break_at(monkeypatch, {3, 7}, what)
    found = heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "healed")
    assert found.skipped == 2
    assert "step 7: loss or gradient is not finite; skipped (2 so far)" in capsys.readouterr().err
    assert found.curve[-1].kl < found.curve[0].kl
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "healed" / "model.safetensors").values())


def test_too_many_stop_the_healing(tiny, hybrid, tmp_path, monkeypatch):
    break_at(monkeypatch, {3, 4, 6}, "loss")
    with pytest.raises(TrainingError, match=r"not finite at step 6 of 12, and 2 were skipped before, .* max_skipped"):
        heal.run(hybrid, tiny, settings_with(max_skipped=2), out=tmp_path / "healed")
    assert not (tmp_path / "healed").exists()


# ------------------------------------------------------------------------------------------------ several processes

RUN = "import sys; from layerboost.cli import main; sys.argv[0] = 'layerboost'; main()"


def torchrun(*words, processes=2, **options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "--no-python",
        sys.executable, "-c", RUN, *map(str, words),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


def written(config):
    """As `key=value` words."""
    return [f"{key}={json.dumps(value)}" for key, value in config.model_dump(mode="json", exclude_unset=True).items()]


@pytest.mark.parametrize(
    ("layers", "shard"),
    [
        pytest.param(LAYERS, False, id="plain"),
        pytest.param(OWN, False, id="own parameters"),
        pytest.param(OWN, True, id="own parameters, sharded"),
        pytest.param([FULL, NONE, window(4), FULL], True, id="shared beginning, sharded"),
    ],
)
def test_two_processes_give_the_curve_of_one(tiny, tmp_path, layers, shard):
    """With a batch that does not divide, one process that has nothing to do in the last step, and passes of one
    sequence, which are more for one process than for the other, where weights are spread."""
    hybrid = convert.run(tiny, Plan(layers=layers), out=tmp_path / "hybrid")
    config = settings_with(batch=3, tokens=49 * 64, gradient_checkpointing=shard, micro_batch=1 if shard else None)
    alone = heal.run(hybrid, tiny, config, out=tmp_path / "alone")
    words = ["heal", hybrid, "--teacher", tiny, "--out", tmp_path / "shared", *written(config), f"shard={shard}"]
    process = torchrun(*words)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    found = heal.Healing.model_validate_json((tmp_path / "shared" / "healing.json").read_text())
    for metric in ("kl", "nll", "recall_kl"):
        wanted = [getattr(point, metric) for point in alone.curve]
        assert [getattr(point, metric) for point in found.curve] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    losses = [point.loss for point in alone.curve[1:]]
    assert [point.loss for point in found.curve[1:]] == pytest.approx(losses, rel=1e-4)
    assert found.provenance["processes"] == 2


def test_one_process_that_dies_ends_all(tiny, hybrid, tmp_path):
    long = settings_with(tokens=3_000_000)
    process = torchrun("heal", hybrid, "--teacher", tiny, "--out", tmp_path / "out", *written(long))
    try:
        deadline = time.monotonic() + 120
        workers = []
        while len(workers) < 2 or not steps(tmp_path / "out-steps"):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
            workers = [int(pid) for pid in listed.split()]
            time.sleep(0.5)
        os.kill(workers[1], signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - started < 60
        assert process.returncode != 0
        assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}") and _runs(pid)]
    finally:
        process.kill()
    assert not (tmp_path / "out").exists()


def _runs(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().split()[2] != "Z"


def test_a_bf16_model_heals_sharded(tmp_path):
    folder = make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16)
    hybrid = convert.run(folder, Plan(layers=LAYERS), out=tmp_path / "hybrid")
    process = torchrun("heal", hybrid, "--teacher", folder, "--out", tmp_path / "out", *written(SETTINGS), "shard=true")
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_spreading_needs_several_processes(tiny, hybrid, tmp_path):
    with pytest.raises(heal.UsageError, match="this is one; start it with torchrun"):
        heal.run(hybrid, tiny, settings_with(shard=True), out=tmp_path / "out")


def test_what_is_asked_for_in_the_last_look_is_heard(tiny, hybrid, tmp_path, monkeypatch):
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "whole")
    look, counted = training._Run._look, []

    def last(run):
        look(run)
        counted.append(run.done)
        if run.done == run.steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training._Run, "_look", last)
    with pytest.raises(KeyboardInterrupt):
        heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    seen = len(counted)
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out")
    assert len(counted) == seen  # nothing was left to do but to publish
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_folder_of_states_that_holds_something_else_stays(tiny, hybrid, tmp_path, save_always):
    notes = tmp_path / "out-steps" / "mine" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "out")
    assert notes.read_text() == "mine"
    assert [path.name for path in (tmp_path / "out-steps").iterdir()] == ["mine"]
    heal.run(hybrid, tiny, SETTINGS, out=tmp_path / "other")
    assert not (tmp_path / "other-steps").exists()


def test_what_the_teacher_writes_is_its_own(tiny, tmp_path):
    """Whatever the checkpoint's generation_config.json asks for."""
    written = []
    for name, more in (("plain", {}), ("other", {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1})):
        folder = shutil.copytree(tiny, tmp_path / name)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0} | more))
        healer = Healer(load_original(folder), LAYERS, heal.Config())
        assert healer.model.generation_config.repetition_penalty == more.get("repetition_penalty")
        written.append(heal._write(healer, torch.arange(2, 10).reshape(2, 4), 40, seed=0))
        assert healer.model.generation_config.repetition_penalty == more.get("repetition_penalty")
    assert torch.equal(*written)
    assert any(len(set(row.tolist())) < len(row) for row in written[0])
