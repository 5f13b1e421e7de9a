"""Runs one measurement in a new process: python -m benchmarks.worker '{"what": ..., ...}' prints one JSON line."""

import json
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.peers import THREADS


def run(**task: Any) -> dict[str, Any]:
    """The result of a measurement in a new process.

    task: `what`, the name of the measurement, and its arguments.

    Raises RuntimeError with the last error that the process printed.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(task)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        # JAX prints remarks after the error.
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        raise RuntimeError((errors or lines)[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def do(what: str, **task: Any) -> dict[str, Any]:
    """The measurement named `what`."""
    if what in ("PEFT", "PEFT, compiled", "PEFT, layers compiled"):
        from benchmarks.peers import peft_step

        compiled = {"PEFT": "", "PEFT, compiled": "model", "PEFT, layers compiled": "layers"}
        return peft_step(task["case"], task["steps"], compiled[what])
    if what == "qwix":
        from benchmarks.peers import qwix_step

        return qwix_step(task["case"], task["steps"])
    if what in ("transformers generates", "sborax generates"):
        from benchmarks import generation

        return (generation.ours if what.startswith("sborax") else generation.transformers)(**task)
    if what == "packing":
        from benchmarks import packing

        return packing.measure(**task)
    if what in ("checks", "all checks"):
        from benchmarks import checks

        return checks.results(**task) if what == "checks" else checks.check(**task)
    if what == "foreign":
        from benchmarks import foreign

        return foreign.measure(**task)
    if what == "experts":
        from benchmarks import experts

        return experts.measure(**task)
    from benchmarks import ours

    case = ours.Case(**task["case"])
    if what == "flops":
        return {"flops": ours.flops(case)}
    if what == "matmul":
        return {"flops_per_second": ours.matmul_flops_per_second(case)}
    if what == "pair":
        return ours.pair(case, ours.Case(**task["other"]), task["steps"])
    if what == "arms":
        from benchmarks import arms

        return arms.measure([case, *(ours.Case(**other) for other in task["others"])], task["steps"], task["profile"])
    if what == "sweep":
        from benchmarks import sweep

        return sweep.measure(case, task["members"], task["steps"])
    return ours.measure(case, task["steps"])


if __name__ == "__main__":
    print(json.dumps(do(**json.loads(sys.argv[1]))))
