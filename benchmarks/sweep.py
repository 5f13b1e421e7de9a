"""The time of a sweep's step over that of as many single steps.

Members differ in learning rate and in seed, hence in the rows that SBoRA moves. Single steps, a sweep by `lax.map` and
a sweep by `vmap` are timed in turn in one process.
"""

from typing import Any

import jax

import sborax as sx
from benchmarks.ours import METHODS, Case, plain_model, random_batch, random_params
from benchmarks.runner import Runner, time_ratio
from sborax.layout.state import Parts, start, take_apart
from sborax.sweep.grid import Sweep
from sborax.sweep.members import gather, make_sweep_step
from sborax.train.optimizer import make_optimizer
from sborax.train.step import make_step

STEPS = 1000
CALLS = 5
"""Steps that are timed as one on an accelerator."""


def measure(case: Case, members: int, steps: int) -> dict[str, Any]:
    """Seconds of `members` single steps and of the sweeps' steps, with the ratios of their medians.

    members: an even number; half of them have one learning rate, half another.
    """
    model = plain_model(case.sizes, case.dtype, case.remat)
    # cuDNN's attention cannot be mapped over members.
    mapped = plain_model(case.sizes, case.dtype, case.remat, attention="xla")
    params, batch = random_params(model, case.method.startswith("Q")), random_batch(case)
    rules = [(case.modules, METHODS[case.method](case.rank))]
    plain = sx.Experiment(model="random", data=sx.Data("random"), rules=rules, steps=STEPS)
    grid = {"optimizer.lr": (1e-4, 3e-4), "seed_adapter": tuple(range(members // 2))}
    planned = Sweep(plain, grid).members()

    def parts(seed: int) -> Parts:
        return take_apart(params, sx.attach(jax.random.key(seed), params, rules)[1])

    separate = [parts(member.experiment.seed_adapter) for member in planned]
    first, tx = separate[0], make_optimizer(plain.optimizer, STEPS)
    step = make_step(model, tx, jax.random.key(1))
    arms = {"single": Runner.of(step, start(first, tx), first.frozen, first.base, batch)}
    for at_once, name in ((1, "lax.map"), (members, "vmap")):
        stacked, state = gather(planned, separate, STEPS, at_once)
        arms[name] = Runner.of(
            make_sweep_step(mapped if at_once > 1 else model, stacked),
            state,
            stacked.constants,
            stacked.shared,
            first.base,
            batch,
        )
    calls = 1 if jax.default_backend() == "cpu" else CALLS
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(steps + 1):
        for name, arm in arms.items():
            elapsed = sum(arm.seconds(calls) for _ in range(members if name == "single" else 1))
            # The first round warms up.
            seconds[name] += [elapsed] if number else []
    measured = {name: arm.compiled_facts() | {"seconds": seconds[name]} for name, arm in arms.items()}
    for name in ("lax.map", "vmap"):
        measured[name]["over_single_runs"] = time_ratio(seconds[name], seconds["single"])
    return measured
