"""Runs that things go wrong for: full disks, damaged checkpoints, unreadable samples, signals at any moment."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import threading
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nightly import nightly_unless

import sborax as sx
from sborax.cli.facts import facts
from sborax.cli.targets import load_run
from sborax.data.batches import Batches
from sborax.data.samples import load_samples
from sborax.records import best, checkpoint, report
from sborax.records.adapter import LEAVES
from sborax.train import loop, stop
from sborax.train.loop import train
from sborax.train.measure import loss_on
from sborax.train.read import read_held_out
from tests.tiny_model import tokenizer, write_data, write_model

STEPS = 5


pytestmark = [
    pytest.mark.usefixtures("compiled_once"),
    # What orbax and tensorstore have forgotten of a failed write is told by a thread, whenever that comes to it.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    place = tmp_path_factory.mktemp("places")
    name = str(write_data(place / "data.jsonl", rows=8))
    data = sx.Data(name, template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    return sx.Experiment(
        model=str(write_model(place / "model")),
        data=data,
        rules=(("mlp", sx.LoRA(rank=4)),),
        optimizer=sx.Optimizer(lr=1e-2),
        steps=STEPS,
        batch_size=2,
        save=sx.Save(every=1, best=True),
        eval=sx.Eval(data=dataclasses.replace(data, limit=2), every=2),
    )


@pytest.fixture(scope="module")
def reference(experiment, tmp_path_factory):
    """The same run, undisturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train(experiment, out, echo=quiet), out


def quiet(_):
    """Says nothing."""


def same_ends(expected, out):
    """Adapters, the best ones too, and every loss, bit for bit."""
    for name in ("adapter", "best"):
        assert (expected / name / LEAVES).read_bytes() == (out / name / LEAVES).read_bytes(), name
    losses = [
        [line["loss"] for line in report.Metrics(epath.Path(run), STEPS).lines if "loss" in line]
        for run in (expected, out)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


# A full disk


class Disk:
    """Refuses, once it is full, to let any file grow."""

    def __init__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, self.before[1]))

    def free(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def disk():
    drive = Disk()
    yield drive
    drive.free()


@contextlib.contextmanager
def just_before(owner, name, act, when=lambda *_: True):
    """Calls `act` at the beginning of calls of `owner.name` for which `when` is true, all three with its arguments."""
    inner = getattr(owner, name)

    def outer(*args, **options):
        if when(*args):
            act(*args)
        return inner(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, outer)
        yield


def at_step(number):
    """For `Metrics.add`."""
    return lambda _, line: line.get("step") == number and "loss" in line


def save_at(number):
    """For `Checkpoints.save`."""
    return lambda _, step, *arguments: step == number


FULL = {
    "checkpoint": (checkpoint.Checkpoints, "save", save_at(3), "run/checkpoints: not written", 2),
    "metrics": (report.Metrics, "add", at_step(3), "run/metrics.jsonl: not written", 2),
    "best": (loop, "save_adapter", lambda place, *_: place.name == ".best.new", "best.new/.*: not written", 1),
    "adapter": (loop, "save_adapter", lambda place, *_: place.name == "adapter", "adapter/.*: not written", STEPS),
}


@pytest.mark.parametrize("case", nightly_unless(["adapter"], FULL))
def test_a_full_disk_stops_a_run_that_later_goes_on(case, experiment, reference, disk, tmp_path, monkeypatch):
    owner, name, when, problem, step = FULL[case]
    opened = []
    monkeypatch.setattr(
        loop, "open_checkpoints", lambda *args: opened.append(checkpoint.open_checkpoints(*args)) or opened[-1]
    )

    def fill(*_):
        # What is being written when the disk fills is lost, and differs from run to run.
        opened[-1].wait()
        disk.fill()

    with just_before(owner, name, fill, when), pytest.raises(sx.SboraxError, match=problem) as caught:
        train(experiment, tmp_path / "run", echo=quiet)
    disk.free()
    assert "(File too large); make room, then --resume" in str(caught.value) and "\n" not in str(caught.value)
    lines = []
    train(experiment, tmp_path / "run", resume=True, echo=lines.append)
    assert f"resuming after step {step}" in lines
    same_ends(reference[1], tmp_path / "run")


# Damaged checkpoints


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two checkpoints, what they hold, and every file and folder of the second."""
    place = epath.Path(tmp_path_factory.mktemp("checkpoints"))
    rng = np.random.default_rng(0)
    trees = [{"w": jnp.asarray(rng.normal(size=(9, 17)), jnp.float32), "n": jnp.int32(i)} for i in range(2)]
    checkpoints = checkpoint.open_checkpoints(place, 3)
    for step, tree in enumerate(trees, start=1):
        checkpoints.save(step, tree, {"epoch": 0, "row": step})
    checkpoints.close()
    return trees, place, sorted(path.relative_to(place) for path in Path(place / "checkpoints" / "2").rglob("*"))


@pytest.mark.nightly
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_whatever_happens_to_a_checkpoint_no_wrong_number_is_read(two, data):
    trees, place, names = two
    name = data.draw(st.sampled_from([str(name) for name in names]))
    copy = place.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(place, copy)
    victim = copy / name
    kind = data.draw(st.sampled_from(["flip", "truncate", "delete"])) if victim.is_file() else "delete"
    if victim.is_dir():
        victim.rmtree()
    elif kind == "delete":
        victim.unlink()
    else:
        content = bytearray(victim.read_bytes())
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] ^= data.draw(st.integers(1, 255))
        victim.write_bytes(bytes(content if kind == "flip" else content[:where]))
    lines = []
    checkpoints = checkpoint.open_checkpoints(copy, 3)
    tree, step = checkpoints.restore(trees[0], lines.append)
    checkpoints.close()
    # Bytes that nobody reads do not matter.
    assert lines == [] if step == 2 else len(lines) == 1 and lines[0].startswith("checkpoint 2 is damaged (")
    chex.assert_trees_all_equal(tree, trees[step - 1])


# Samples that cannot be read


@pytest.mark.parametrize(
    "line, template, problem",
    [
        (b'{"instruction": "half', "alpaca", "is not JSON"),
        (b'{"instruction": "a", "output": "\xff"}', "alpaca", "is not UTF-8 text \\(byte 0xff\\)"),
        (b"7", "alpaca", "is not an object with columns"),
        (b'{"instruction": ["a"], "output": "b"}', "alpaca", "column 'instruction' holds a list, where text belongs"),
        (b'{"instruction": "a", "output": {"b": 1}}', "chat", "column 'output' holds a dict, where text belongs"),
        (b'{"instruction": "a", "output": "\\ud800"}', "alpaca", "not text \\(surrogates not allowed\\)"),
        (b'{"messages": [5]}', "chat", 'column "messages" must be a list of'),
        (b'{"messages": [{"role": "user", "content": [1]}]}', "chat", "the content of a message holds a list"),
    ],
)
def test_an_unreadable_sample_is_named_by_file_and_line(tmp_path, line, template, problem):
    file = tmp_path / "data.jsonl"
    file.write_bytes(b'{"instruction": "a", "output": "b"}\n\n' + line + b"\n")
    with pytest.raises(sx.SboraxError, match=f"data.jsonl: line 3:? {problem}") as caught:
        load_samples(sx.Data(str(file), template=template, max_length=400), tokenizer(), 1, 512)
    assert "\n" not in str(caught.value)


# Signals


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


def test_sigterm_in_every_phase_of_a_run(experiment, reference, tmp_path):
    out, lines = tmp_path / "run", []

    def loading(text):
        if text.startswith(("loading", "compiling")) and text not in lines:
            lines.append(text)
            send(signal.SIGTERM)

    for resume in (False, True):
        with pytest.raises(stop.Stopped, match="SIGTERM before the first step: nothing is lost, --resume"):
            train(experiment, out, resume=resume, echo=loading)
    phases = (
        (report.Metrics, "add", at_step(1), 2),
        (checkpoint.Checkpoints, "save", save_at(3), 4),
        (checkpoint.Checkpoints, "close", lambda *_: True, STEPS),
    )
    for owner, name, when, last in phases:
        with just_before(owner, name, lambda *_: send(signal.SIGTERM), when):
            summary = train(experiment, out, resume=True, echo=quiet)
        assert summary.steps <= last and summary.finished == (summary.steps == STEPS)
        assert (out / "adapter").exists() == summary.finished
    with just_before(loop, "save_adapter", lambda *_: send(signal.SIGTERM)):
        assert train(experiment, out, resume=True, echo=quiet).finished
    same_ends(reference[1], out)


# Python only reports an exception that a signal raises inside a finaliser.
def test_sigterm_at_random_moments(experiment, reference, tmp_path):
    seed = random.SystemRandom().randrange(2**32)
    delays, out = random.Random(seed), tmp_path / "run"
    out.mkdir()
    for _ in range(3):
        timer = threading.Timer(delays.uniform(0, 1.5 * reference[0].seconds), send, (signal.SIGTERM,))
        with contextlib.suppress(stop.Stopped), stop_after(timer):
            train(experiment, out, resume=True, echo=quiet)
    train(experiment, out, resume=True, echo=quiet)
    same_ends(reference[1], out)


@contextlib.contextmanager
def stop_after(timer):
    """The timer's signal comes in this block or not at all."""
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGTERM, handler)


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_second_signal_is_answered_as_before_the_run(experiment, reference, tmp_path):
    def kill(*_):
        raise Killed

    (tmp_path / "run").mkdir()
    # A process that was begun in the background ignores Ctrl-C.
    handlers = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, kill), (signal.SIGINT, signal.default_int_handler))
    }
    try:
        for numbers, error, step in (
            ((signal.SIGTERM, signal.SIGTERM), Killed, 2),
            ((signal.SIGINT, signal.SIGINT), KeyboardInterrupt, 3),
        ):
            act = lambda *_, numbers=numbers: send(*numbers)  # noqa: E731
            with just_before(report.Metrics, "add", act, at_step(step)), pytest.raises(error):
                train(experiment, tmp_path / "run", resume=True, echo=quiet)
            assert signal.getsignal(signal.SIGTERM) is kill
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    lines = []
    train(experiment, tmp_path / "run", resume=True, echo=lines.append)
    assert "resuming after step 2" in lines
    same_ends(reference[1], tmp_path / "run")


def test_a_signal_saves_at_once_and_measures_nothing(experiment, tmp_path):
    """Little time may be left, and the best adapter must not depend on when a run was interrupted."""
    late = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, every=100))
    with just_before(report.Metrics, "add", lambda *_: send(signal.SIGTERM), at_step(2)):
        stopped = train(late, tmp_path / "run", echo=quiet)
    lines = report.Metrics(epath.Path(tmp_path / "run"), STEPS).lines
    assert stopped.steps < STEPS and not any("eval_loss" in line for line in lines)
    assert stopped.eval_loss is None and not (tmp_path / "run" / "best").exists()
    train(late, tmp_path / "run", resume=True, echo=quiet)
    lines = report.Metrics(epath.Path(tmp_path / "run"), STEPS).lines
    assert [line["step"] for line in lines if "eval_loss" in line] == [STEPS]


# The best adapter


def test_the_best_adapter_is_the_one_with_the_lowest_held_out_loss(experiment, tmp_path, monkeypatch):
    often = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, every=1))
    offer = best.Best.offer
    # The loss falls from step to step, so that with its sign turned the first adapter is the best.
    monkeypatch.setattr(best.Best, "offer", lambda self, step, loss, write: offer(self, step, -loss, write))
    train(often, tmp_path / "run", echo=quiet)
    lines = report.Metrics(epath.Path(tmp_path / "run"), STEPS).lines
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert max(losses, key=losses.get) == 1 and len(losses) == STEPS
    for name, step in (("best", 1), ("", STEPS)):
        target = load_run(str(tmp_path / "run" / name))
        value = loss_on(target.model, target.params, target.adapters, read_held_out(often, target.model, quiet))
        assert value == pytest.approx(losses[step], rel=1e-6), name
        rows = (tmp_path / "run" / name / "eval_losses.jsonl").read_text().splitlines()
        samples = [json.loads(line) for line in rows]
        mean = sum(sample["loss"] for sample in samples) / sum(sample["tokens"] for sample in samples)
        assert mean == pytest.approx(losses[step], rel=1e-6), name


def test_the_best_survives_a_crash_and_other_data_begin_anew(tmp_path):
    run = epath.Path(tmp_path)

    def write(place, **notes):
        sx.save_adapter(place, {}, about=notes)

    first = best.best_so_far(run, "data", 0, quiet)
    assert [first.offer(step, loss, write) for step, loss in enumerate((2.0, 3.0, 1.0, 1.0, float("nan")))] == [
        True, False, True, False, False
    ]  # fmt: skip
    assert best.best_so_far(run, "data", 2, quiet).loss == 1.0
    assert best.best_so_far(run, "other data", 2, quiet).loss == float("inf")
    # Steps after the one from which the run goes on are made again.
    assert best.best_so_far(run, "data", 1, quiet).loss == float("inf")
    (run / "best").rename(run / ".best.old")
    assert best.best_so_far(run, "data", 2, quiet).loss == 1.0
    lines = []
    (run / "best" / "plan.json").write_text("{")
    assert best.best_so_far(run, "data", 2, lines.append).loss == float("inf")
    assert "not JSON" in lines[0] and "starting without a best adapter" in lines[0]


def test_the_best_needs_losses_to_compare(experiment):
    with pytest.raises(
        sx.SboraxError, match="save.best: needs held-out losses to compare; set eval.data and eval.every"
    ):
        dataclasses.replace(experiment, eval=sx.Eval(data=experiment.data))


# A crash of the thread that makes batches


def test_a_crash_while_a_batch_is_made_ends_the_run_and_it_goes_on(experiment, reference, tmp_path, monkeypatch):
    part = Batches.part

    def crash(batches, step, rows):
        if step == 3:
            raise RuntimeError("the thread is gone")
        return part(batches, step, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "part", crash)
        with pytest.raises(RuntimeError, match="the thread is gone"):
            train(experiment, tmp_path / "run", echo=quiet)
    lines = []
    train(experiment, tmp_path / "run", resume=True, echo=lines.append)
    assert "resuming after step 3" in lines
    same_ends(reference[1], tmp_path / "run")


def test_a_run_that_went_on_and_did_not_end_says_which_adapter_it_has(experiment, reference, tmp_path, capsys):
    _, ended = reference
    out = tmp_path / "run"
    shutil.copytree(ended, out)
    # The signal is seen after the step that is computed by then.
    signalled = just_before(report.Metrics, "add", lambda *_: signal.raise_signal(signal.SIGTERM), at_step(STEPS + 1))
    with signalled:
        assert not train(dataclasses.replace(experiment, steps=STEPS + 3), out, resume=True, echo=quiet).finished
    capsys.readouterr()
    load_run(str(out))
    message = f"{out}: was continued to step {STEPS + 2} and has not ended; its adapter is that of step {STEPS}"
    assert capsys.readouterr().out.startswith(message)
    # The summary is of the later steps.
    assert "Metrics" not in facts(str(out)) and "Metrics" in facts(str(out / "best"))
    # The best adapter is that of all steps, and a run that ended says nothing.
    for target in (out / "best", ended):
        load_run(str(target))
        assert capsys.readouterr().out == ""
