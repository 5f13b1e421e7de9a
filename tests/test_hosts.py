"""A run of two processes with two devices each, as on two hosts: trained, killed, resumed, ended by a signal."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_model import write_data, write_model

import sborax as sx
from sborax.cli.launcher import LOST, ended, is_several
from sborax.cli.main import _parse
from sborax.records.eval_losses import EVAL_LOSSES
from sborax.train.loop import train

STEPS = 24
ROWS = 24
FOREVER = "steps=100000"
GLOO = re.compile(
    r"(\[Gloo\] Rank| is connected to | peer ranks\. |Expected number of connected peer ranks is : |[\s\d])*"
)
"""What the network between CPUs writes to standard output itself, by pieces, from several threads at once."""
HEARTBEAT = 6
EXPERIMENT = """
import sborax as sx

def experiment():
    data = sx.Data({data!r}, template="{{instruction}}", answer=" {{output}}", max_length=64)
    rules = (("q_proj", sx.LoRA(rank=2, dropout=0.1)), ("down_proj", sx.PiSSA(rank=2)))
    return sx.Experiment({model!r}, data, rules, sx.Optimizer(lr=1e-2, schedule="constant", warmup=0), steps={steps},
                         eval=sx.Eval(data), save=sx.Save(every=4), mesh={{"fsdp": 2, "tensor": 2}})
"""
PROGRAM = """
import sys
import jax
import sborax as sx
from sborax.train.loop import train

experiment, out, coordinator, process, *resume = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
train(sx.load_experiment(experiment), out, bool(resume))
"""


class Pair:
    """The two processes of a run: of the command `sborax train`, or of a program of one's own."""

    def __init__(self, experiment, out, cache, *arguments, script=False):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            coordinator = f"localhost:{probe.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        train = [sys.executable, "-m", "sborax", "train", str(experiment), "--out", str(out), *arguments]
        train += ["--coordinator", coordinator, "--processes", "2", "--heartbeat", str(HEARTBEAT)]
        program = [sys.executable, "-c", PROGRAM, str(experiment), str(out), coordinator]
        self.out, pipes = out, {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.processes = [
            subprocess.Popen(
                [*program, str(number), *arguments] if script else [*train, "--process", str(number)],
                env=environment,
                text=True,
                **pipes,
            )
            for number in range(2)
        ]

    def until_step(self, step):
        """Wait until the metrics have come so far."""
        ends = time.monotonic() + 600
        while time.monotonic() < ends:
            assert all(process.poll() is None for process in self.processes), self.ended()
            if _lines(self.out) and _lines(self.out)[-1]["step"] >= step:
                return
            time.sleep(0.02)
        raise AssertionError("the run does not come to its step")

    def ended(self):
        """Exit codes and what was printed."""
        outputs = [process.communicate(timeout=600) for process in self.processes]
        out = [[line for line in out.splitlines() if not GLOO.fullmatch(line)] for out, _ in outputs]
        return (
            [process.returncode for process in self.processes],
            ["\n".join(lines) for lines in out],
            [err for _, err in outputs],
        )


@pytest.fixture
def pair():
    """Makes pairs, of which none outlives the test."""
    runs = []

    def make(*arguments, **options):
        runs.append(Pair(*arguments, **options))
        return runs[-1]

    yield make
    for process in (process for run in runs for process in run.processes):
        process.kill()


def _lines(run):
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _losses(run):
    return np.array([line["loss"] for line in _lines(run) if "loss" in line])


@pytest.fixture
def experiment(tmp_path):
    """The file of an experiment."""
    model = write_model(tmp_path / "model", num_key_value_heads=2)
    data = write_data(tmp_path / "data.jsonl", ROWS)
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT.format(model=str(model), data=str(data), steps=STEPS))
    return file


def test_two_processes_train(tmp_path, pair, experiment):
    codes, out, err = pair(experiment, tmp_path / "run", tmp_path / "cache", script=True).ended()
    assert codes == [0, 0], err
    assert "mesh: fsdp 2 x tensor 2 of 4 devices" in out[0] and out[1] == ""
    # Norms are on every host, and of all the rest each has its half.
    share, total = map(int, out[0].split("weights: ")[1].split(" bytes")[0].replace(",", "").split(" of "))
    assert 0.5 * total < share < 0.55 * total
    assert len(_losses(tmp_path / "run")) == STEPS


@pytest.mark.nightly
def test_two_processes_die_and_resume(tmp_path, pair, experiment):
    cache = tmp_path / "cache"
    codes, _, err = pair(experiment, tmp_path / "whole", cache, script=True).ended()
    assert codes == [0, 0], err

    killed = pair(experiment, tmp_path / "killed", cache, FOREVER)
    killed.until_step(10)
    killed.processes[1].kill()
    codes, _, err = killed.ended()
    assert codes == [LOST, -signal.SIGKILL]
    assert err[0].splitlines()[-1].startswith("error: process 1 of this run is gone"), err[0]
    assert "--resume" in err[0] and "Traceback" not in err[0]

    codes, out, err = pair(experiment, tmp_path / "killed", cache, "--resume", script=True).ended()
    assert codes == [0, 0], err
    assert "resuming after step" in out[0]
    first, second = (load_file(tmp_path / run / "adapter/adapter.safetensors") for run in ("whole", "killed"))
    assert first.keys() == second.keys()
    for name, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[name], err_msg=name)
    np.testing.assert_array_equal(_losses(tmp_path / "whole"), _losses(tmp_path / "killed"))
    samples = [(tmp_path / run / EVAL_LOSSES).read_text() for run in ("whole", "killed")]
    assert samples[0] == samples[1] and len(samples[0].splitlines()) == ROWS


@pytest.mark.nightly
def test_two_processes_are_stopped_and_one_goes_on(tmp_path, pair, experiment):
    stopped = pair(experiment, tmp_path / "stopped", tmp_path / "cache", FOREVER)
    stopped.until_step(10)
    stopped.processes[1].send_signal(signal.SIGTERM)
    codes, out, err = stopped.ended()
    assert codes == [130, 130], err
    assert "saved; --resume continues" in out[0]
    summary = json.loads((tmp_path / "stopped/summary.json").read_text())
    assert not summary["finished"] and summary["steps"] == len(_losses(tmp_path / "stopped"))
    assert (tmp_path / "stopped/checkpoints" / str(summary["steps"])).is_dir()

    # The same checkpoints on one process and one device, written by two.
    steps = summary["steps"] + 4
    alone = sx.load_experiment(str(experiment), ["mesh=null", f"steps={steps}"])
    assert train(alone, tmp_path / "stopped", resume=True, echo=lambda text: None).finished
    train(alone, tmp_path / "alone", echo=lambda text: None)
    np.testing.assert_allclose(_losses(tmp_path / "alone"), _losses(tmp_path / "stopped"), rtol=0, atol=1e-5)


BETWEEN_STEPS = """
import sborax as sx

def experiment():
    data = sx.Data({data!r}, template="{{instruction}}", answer=" {{output}}", max_length=64)
    optimizer = sx.Optimizer(lr=1e-3, eps=1e-4, schedule="constant", warmup=0)
    return sx.Experiment({model!r}, data, [("self_attn|mlp", sx.{method})], optimizer, steps=10,
                         save=sx.Save(every=7), mesh={{"fsdp": 2, "tensor": 2}}, procedure=sx.{procedure})
"""


@pytest.mark.parametrize(
    ("procedure", "method"),
    [
        pytest.param("COLA(every=3)", "SBoRA(rank=2)", marks=pytest.mark.nightly),
        pytest.param(
            "LoRAPrune(warmup=0.0, cooldown=0.3, every=1, protect=0.0)", "LoRA(rank=2)", marks=pytest.mark.nightly
        ),
    ],
    ids=["COLA", "LoRAPrune"],
)
def test_a_procedure_acts_alike_on_two_processes(procedure, method, tmp_path, pair):
    model = write_model(tmp_path / "model", num_key_value_heads=2)
    data = write_data(tmp_path / "data.jsonl")
    experiment, cache = tmp_path / "experiment.py", tmp_path / "cache"
    experiment.write_text(BETWEEN_STEPS.format(model=str(model), data=str(data), procedure=procedure, method=method))
    codes, _, err = pair(experiment, tmp_path / "whole", cache, script=True).ended()
    assert codes == [0, 0], err
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "10")
    shutil.rmtree(tmp_path / "cut" / "adapter")
    codes, out, err = pair(experiment, tmp_path / "cut", cache, "--resume", script=True).ended()
    assert codes == [0, 0], err
    assert "resuming after step 7" in out[0]
    first, second = ((tmp_path / run / "adapter/adapter.safetensors").read_bytes() for run in ("whole", "cut"))
    assert first == second
    train(sx.load_experiment(str(experiment), ["mesh=null"]), tmp_path / "alone", echo=lambda text: None)
    np.testing.assert_allclose(_losses(tmp_path / "alone"), _losses(tmp_path / "whole"), rtol=0, atol=1e-5)


SILENT = """E1 coordination_service.cc:1549] Use error polling to propagate the following error to all tasks:
The following tasks are unhealthy (stopped sending heartbeats):
{}
The tasks have crashed. Check the task logs for an earlier error, or scheduler events to debug further."""
LEADER = "F1 client.h:80] Terminating process. Failed to send RPC to coordination service. Either the leader task died"


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        (-signal.SIGABRT, SILENT.format("1"), "process 1 of this run is gone"),
        (-signal.SIGABRT, SILENT.format("1\n12"), "processes 1, 12 of this run are gone"),
        (-signal.SIGABRT, SILENT.format("/job:jax_worker/replica:0/task:3"), "process 3 of this run is gone"),
        (-signal.SIGABRT, LEADER, "process 0 of this run is gone"),
        (-signal.SIGKILL, "", "this process was ended by SIGKILL"),
        (LOST, "", "another process of this run is gone, or cannot be reached"),
    ],
)
def test_what_the_runtime_says_becomes_a_line(code, output, message):
    assert ended(code, output).startswith(message)
    assert "--resume" in ended(code, output)


@pytest.mark.parametrize(
    ("words", "environment", "several"),
    [
        ([], {}, False),
        (["--distributed"], {}, True),
        (["--process", "1"], {}, True),
        ([], {"JAX_COORDINATOR_ADDRESS": "host:1"}, True),
        ([], {"SLURM_STEP_NUM_TASKS": "4"}, True),
        ([], {"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_one_of_several_is_known_by_its_launcher(words, environment, several, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_several(_parse(["train", "experiment.py", *words])) is several


@pytest.mark.parametrize(
    ("script", "program", "arguments", "lines"),
    [
        (
            "launch_tpu_pod.sh",
            "gcloud",
            ["pod", "us-east5-a", "train", "my file.py", "--out", "gs://b/run"],
            [
                "compute tpus tpu-vm ssh pod --zone=us-east5-a --worker=all --command=cd sborax && env  "
                ".venv/bin/sborax train my\\ file.py --out gs://b/run --distributed"
            ],
        ),
        (
            "launch_slurm.sh",
            "srun",
            ["e.py", "--out", "/shared/run"],
            ["--kill-on-bad-exit=1 sborax train e.py --out /shared/run --resume --distributed"],
        ),
    ],
)
def test_launch_scripts(script, program, arguments, lines, tmp_path):
    fake = tmp_path / program
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n')
    fake.chmod(0o755)
    scripts = Path(__file__).resolve().parents[1] / "scripts"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": "1"}
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    subprocess.run(["bash", scripts / script, *arguments], env=environment, check=True, cwd=tmp_path)
    assert (tmp_path / "said").read_text().splitlines() == lines
