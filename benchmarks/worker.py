"""One measurement in a process of its own: python -m benchmarks.worker '{"what": ..., ...}' prints one JSON line."""

import json
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.peers import THREADS


def run(**task: Any) -> dict[str, Any]:
    """What a new process measures.

    Raises RuntimeError with the last error it named if it fails.
    """
    env = {**os.environ, "OMP_NUM_THREADS": str(THREADS), "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "-m", "benchmarks.worker", json.dumps(task)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        # JAX adds remarks of its own after the error.
        named = [line for line in said if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)]
        raise RuntimeError((named or said)[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def do(what: str, **task: Any) -> dict[str, Any]:
    """The measurement named `what`."""
    if what in ("PEFT", "PEFT, compiled"):
        from benchmarks.peers import peft_step

        return peft_step(task["case"], task["steps"], what.endswith("compiled"))
    if what == "qwix":
        from benchmarks.peers import qwix_step

        return qwix_step(task["case"], task["steps"])
    if what in ("transformers generates", "sborax generates"):
        from benchmarks import generation

        return (generation.ours if what.startswith("sborax") else generation.transformers)(**task)
    from benchmarks import ours

    case = ours.Case(**task["case"])
    if what == "flops":
        return {"flops": ours.flops(case)}
    if what == "matmul":
        return {"flops_per_second": ours.matmul_flops_per_second(case)}
    if what == "pair":
        return ours.pair(case, ours.Case(**task["other"]), task["steps"])
    if what == "sweep":
        from benchmarks import sweep

        return sweep.measure(case, task["members"], task["steps"])
    return ours.measure(case, task["steps"])


if __name__ == "__main__":
    print(json.dumps(do(**json.loads(sys.argv[1]))))
