"""A step of a sweep over as many single steps, over one base.

Members differ in learning rate and seed, so in what SBoRA indexes. Single steps, the sweep by `lax.map` and the one by
`vmap` are timed in turn in one process.
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


def measure(case: Case, members: int, steps: int) -> dict[str, Any]:
    """Seconds of as many single steps, and of the sweep's one, with the ratio of their medians.

    members: an even number; half of them have one learning rate, half another.
    """
    # cuDNN's attention cannot be mapped over members.
    model = plain_model(case.sizes, case.dtype, case.remat, attention="xla")
    params, batch = random_params(model, case.method.startswith("Q")), random_batch(case)
    rules = [(case.modules, METHODS[case.method](case.rank))]
    plain = sx.Experiment(model="random", data=sx.Data("random"), rules=rules, steps=STEPS)
    grid = {"optimizer.lr": (1e-4, 3e-4), "seed_adapter": tuple(range(members // 2))}
    crew_of = Sweep(plain, grid).members()

    def parts(seed: int) -> Parts:
        return take_apart(params, sx.attach(jax.random.key(seed), params, rules)[1])

    each = [parts(member.experiment.seed_adapter) for member in crew_of]
    base, tx = each[0].base, make_optimizer(plain.optimizer, STEPS)
    step = make_step(model, tx, jax.random.key(1))
    arms = {"single": Runner.of(step, start(each[0], tx), each[0].frozen, base, batch)}
    for at_once, name in ((1, "lax.map"), (members, "vmap")):
        crew, state = gather(crew_of, each, STEPS, at_once)
        arms[name] = Runner.of(make_sweep_step(model, crew), state, crew.own, crew.shared, base, batch)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(steps + 1):
        for name, arm in arms.items():
            taken = sum(arm.seconds() for _ in range(members if name == "single" else 1))
            # The first round warms up.
            seconds[name] += [taken] if number else []
    told = {name: arm.told() | {"seconds": seconds[name]} for name, arm in arms.items()}
    for name in ("lax.map", "vmap"):
        told[name]["over_single_runs"] = time_ratio(seconds[name], seconds["single"])
    return told
