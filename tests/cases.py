"""One row a method: what the contract suite runs it with, and the closed form of its parameter count.

Adding a method adds a row here. The suite reads what a method declares (class attributes), never its name.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.adapters.hints import statistics
from sborax.adapters.informed import Inputs
from sborax.adapters.invocation import invocations
from sborax.adapters.paths import Site, has_policy
from sborax.procedures import AbstractProcedure

INVOCATION = (32,)
"""The tokens from which some methods act: the question mark of `tiny_model`'s tokenizer, in every row of its data."""
IN, OUT, TOKENS, LAYERS = 128, 96, 7, 3
"""7 divides no product of the other sizes: the size of a value tells whether it is a weight."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    method: AbstractMethod
    count: Callable[[int, int], int]
    """Trained parameters of one (in, out) weight."""
    shared: Callable[[int, int], int] = lambda i, o: 0
    """Those that all weights of this shape share."""


def kronecker(fan_in: int, fan_out: int, rank: int, left_pair: bool = False) -> int:
    """Trained parameters of LoKr: each of the two factors is whole where a pair of this rank would not be smaller."""
    (m, n), (p, k) = (
        max((d, side // d) for d in range(1, side + 1) if d * d <= side and side % d == 0) for side in (fan_in, fan_out)
    )
    left_size = rank * (m + p) if left_pair and 2 * rank < max(m, p) else m * p
    return left_size + (rank * (n + k) if 2 * rank < max(n, k) else n * k)


METHODS = [
    Case("LoRA", sx.LoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("rsLoRA", sx.LoRA(rank=4, alpha=8.0, rslora=True, init_a="gaussian"), lambda i, o: 4 * (i + o)),
    Case("QALoRA", sx.QALoRA(rank=4, alpha=8.0, group=8), lambda i, o: 4 * (i // 8 + o)),
    Case("QALoRA-peft", sx.QALoRA(rank=3, group=4, formula="peft"), lambda i, o: 3 * (i // 4 + o)),
    Case("LoRA-orthogonal", sx.LoRA(rank=4, init_a="orthogonal"), lambda i, o: 4 * (i + o)),
    Case("SBoRA-FA", sx.SBoRA(rank=5, alpha=10.0), lambda i, o: 5 * o),
    Case("SBoRA-FB", sx.SBoRA(rank=5, variant="FB"), lambda i, o: 5 * i),
    Case("SBoRA-expert", sx.SBoRA(rank=5, expert=1, experts=2), lambda i, o: 5 * o),
    Case("Orthogonal", sx.OrthogonalAdaptation(rank=5, alpha=10.0, expert=1, experts=2), lambda i, o: 5 * o),
    Case("Orthogonal-out", sx.OrthogonalAdaptation(rank=5, side="out"), lambda i, o: 5 * i),
    Case("Orthogonal-gaussian", sx.OrthogonalAdaptation(rank=5, sigma=0.2, basis="gaussian"), lambda i, o: 5 * o),
    Case("Bone", sx.Bone(rank=6), lambda i, o: 6 * o),
    Case("Bone-mini", sx.Bone(rank=8, mini_rank=12), lambda i, o: 8 * 12),
    Case("Bone-contiguous", sx.Bone(rank=6, grouping="contiguous"), lambda i, o: 6 * o),
    Case("Bat", sx.Bat(rank=32), lambda i, o: 32 * o),
    Case("DoRA", sx.DoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o) + o),
    Case("PiSSA", sx.PiSSA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("PiSSA-fast", sx.PiSSA(rank=4, niter=4), lambda i, o: 4 * (i + o)),
    Case("OLoRA", sx.OLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("LoRA-GA", sx.LoRAGA(rank=4), lambda i, o: 4 * (i + o)),
    Case("LoRA-GA-peft", sx.LoRAGA(rank=4, formula="peft", gamma=4096.0), lambda i, o: 4 * (i + o)),
    Case("EVA", sx.EVA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("EVA-whitened", sx.EVA(rank=4, rho=1.0, whiten=True, niter=4), lambda i, o: 4 * (i + o)),
    Case("CorDA", sx.CorDA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("CorDA-kpm", sx.CorDA(rank=4, mode="kpm"), lambda i, o: 4 * (i + o)),
    Case("LoftQ", sx.LoftQ(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("LoftQ-twice", sx.LoftQ(rank=4, alpha=8.0, iterations=2, divide=True), lambda i, o: 4 * (i + o)),
    Case("MiCA", sx.MiCA(rank=4, alpha=8.0), lambda i, o: 4 * i),
    Case("PRILoRA", sx.PRILoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("PRILoRA-mask", sx.PRILoRA(rank=4, persistent_mask=True), lambda i, o: 4 * (i + o)),
    Case("SARA", sx.SARA(rank=4), lambda i, o: 4 * (i + o + 1)),
    Case("SARA-svd", sx.SARA(rank=4, factor_init="svd", alpha=8.0), lambda i, o: 4 * (i + o + 1)),
    Case("MoSARA", sx.MoSARA(rank=6, sets=3), lambda i, o: 3 * 6 + o + 6 + 3),
    Case("MoSARA-full", sx.MoSARA(rank=6, sets=3, router="full"), lambda i, o: 3 * 6 + o + 6 * 3),
    Case("MiLoRA", sx.MiLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    # On bare kernels every layer is the first of its chain.
    Case("ResLoRA-block", sx.ResLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("ResLoRA-input", sx.ResLoRA(rank=4, shortcut="input"), lambda i, o: 4 * (i + o)),
    Case("ResLoRA-middle", sx.ResLoRA(rank=4, shortcut="middle", pre_num=2), lambda i, o: 4 * (i + o)),
    Case("AdaLoRA", sx.AdaLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o + 1)),
    Case("VeRA", sx.VeRA(rank=6), lambda i, o: 6 + o),
    Case("PVeRA", sx.PVeRA(rank=6), lambda i, o: 2 * 6 + o),
    Case("TinyLoRA", sx.TinyLoRA(rank=3, coefficients=7), lambda i, o: 7),
    Case("OFT", sx.OFT(block=32), lambda i, o: i * 31 // 2),
    Case("OFT-exact", sx.OFT(block=16, terms=None, share=True), lambda i, o: 16 * 15 // 2),
    Case("OFT-near", sx.OFT(block=16, eps=0.5), lambda i, o: i * 15 // 2),
    Case("BOFT", sx.BOFT(block=8), lambda i, o: 8 * i + o),
    Case("BOFT-butterfly", sx.BOFT(block=4, factors=3), lambda i, o: 3 * 4 * i + o),
    Case("PSOFT", sx.PSOFT(rank=6), lambda i, o: 6 * 5 // 2 + 2 * 6),
    Case("PSOFT-series", sx.PSOFT(rank=5, terms=5, scaled=False), lambda i, o: 5 * 4 // 2),
    Case("HRA", sx.HRA(rank=4), lambda i, o: 4 * i),
    Case("HRA-odd", sx.HRA(rank=5), lambda i, o: 5 * i),
    Case("LoHa", sx.LoHa(rank=3, alpha=6.0), lambda i, o: 2 * 3 * (i + o)),
    Case("LoKr", sx.LoKr(rank=4, alpha=8.0), lambda i, o: kronecker(i, o, 4)),
    Case("LoKr-both", sx.LoKr(rank=2, both=True), lambda i, o: kronecker(i, o, 2, left_pair=True)),
    Case("IA3", sx.IA3(), lambda i, o: o),
    Case("IA3-in", sx.IA3(side="in"), lambda i, o: i),
    Case("SHiRA", sx.SHiRA(rank=4), lambda i, o: 4 * (i + o)),
    # A small rank would leave the scaled bases just below the size of the weight.
    Case("RandLoRA", sx.RandLoRA(rank=64), lambda i, o: -(-min(i, o) // 64) * (64 + min(i, o))),
    Case("HiRA", sx.HiRA(rank=4), lambda i, o: 4 * (i + o)),
    Case("GLoRA", sx.GLoRA(rank=4), lambda i, o: 2 * 4 * (i + o)),
    Case("GLoRA-vector", sx.GLoRA(rank=4, weight="vector", coupling="vector", bias="vector"), lambda i, o: 2 * o),
    Case("GLoRA-constant", sx.GLoRA(rank=4, weight="constant", coupling="none"), lambda i, o: 2),
    Case("DeLoRA", sx.DeLoRA(rank=4), lambda i, o: 4 * (i + o) + 1),
    Case("C3A", sx.C3A(block=16), lambda i, o: i * o // 16),
    Case("FourierFT", sx.FourierFT(coefficients=50), lambda i, o: 50),
    Case("RoAd", sx.RoAd(block=4), lambda i, o: o),
    Case("RoAd-2", sx.RoAd(variant="2", block=32), lambda i, o: 2 * o),
    Case("RoAd-4", sx.RoAd(variant="4", block=4), lambda i, o: 4 * o),
    Case("GraLoRA", sx.GraLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("GraLoRA-hybrid", sx.GraLoRA(rank=8, blocks=4, alpha=None, hybrid=3), lambda i, o: 11 * (i + o)),
    Case("WaveFT", sx.WaveFT(coefficients=50), lambda i, o: 50),
    Case("WaveFT-plain", sx.WaveFT(coefficients=50, wavelet=None), lambda i, o: 50),
    Case("PEANuT", sx.PEANuT(rank=4), lambda i, o: 2 * 4 * o),
    Case("PEANuT-deep", sx.PEANuT(rank=4, depth=2, activation="silu", alpha=2.0), lambda i, o: 2 * 4 * o + 4 * 16),
    Case("SuperTuning", sx.SuperTuning(sparsity=0.95), lambda i, o: int(i * o * (1 - 0.95))),
    Case(
        "SuperTuning-hybrid",
        sx.SuperTuning(sparsity=0.98, largest=False, lora_rank=3, alpha=4.0),
        lambda i, o: int(i * o * (1 - 0.98)) + 3 * (i + o),
    ),
    Case("AdaMSS", sx.AdaMSS(rank=8, subspaces=3, subspace_rank=2), lambda i, o: 2 * (3 * 8 + o)),
    Case("DEFT", sx.DEFT(rank=4), lambda i, o: 4 * (i + o)),
    Case("DEFT-qr", sx.DEFT(rank=4, projection="qr", alpha=8.0), lambda i, o: 4 * (i + o)),
    Case(
        "VB-LoRA", sx.VBLoRA(rank=3, vectors=24, length=16), lambda i, o: 3 * (i + o) // 16 * 24, lambda i, o: 24 * 16
    ),
    Case("Uni-LoRA", sx.UniLoRA(rank=4, coefficients=40), lambda i, o: 0, lambda i, o: 40),
    Case("Lily", sx.Lily(rank=4, stride=8, experts=3), lambda i, o: 4 * 3, lambda i, o: 4 * (i + 3 * o)),
    Case(
        "Lily-batch",
        sx.Lily(rank=4, stride=8, routing="batch", scale=2.0),
        lambda i, o: 4 * 2,
        lambda i, o: 4 * (i + 2 * o),
    ),
    Case("FRoD", sx.FRoD(), lambda i, o: i + max(1, int(i * i * 0.01))),
    Case("FRoD-dense", sx.FRoD(density=1.0, ridge=0.1), lambda i, o: i * i),
    Case("OSF", sx.OSF(kept=0.75), lambda i, o: (min(i, o) - int(0.75 * min(i, o))) * (i + o + 1)),
    Case("KaSA", sx.KaSA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o + 1)),
    Case("BDLoRA", sx.BDLoRA(rank=8, blocks=4, alpha=8.0), lambda i, o: 8 * (i + o // 4)),
    Case("BDLoRA-in", sx.BDLoRA(rank=8, side="in", blocks=4), lambda i, o: 8 * (i // 4 + o)),
    Case("MonteCLoRA", sx.MonteCLoRA(rank=4, alpha=8.0, samples=3, noise=0.1), lambda i, o: 4 * (i + o + 1) + 3),
    Case("VeLoRA", sx.VeLoRA(rank=4, alpha=8.0, groups=16), lambda i, o: 4 * (i + o)),
    Case("VeLoRA-fixed", sx.VeLoRA(rank=4, groups=24, gain=0.5, direction="fixed"), lambda i, o: 4 * (i + o)),
    Case("chain", sx.chain(sx.PiSSA(rank=4), sx.DoRA(rank=4)), lambda i, o: 4 * (i + o) + o),
    Case("sum", sx.add(sx.LoRA(rank=3), sx.SBoRA(rank=4)), lambda i, o: 3 * (i + o) + 4 * o),
    Case("scaled", sx.scale(sx.LoRA(rank=3), 0.5), lambda i, o: 3 * (i + o)),
    Case("activated", sx.Activated(sx.LoRA(rank=3), tokens=INVOCATION), lambda i, o: 3 * (i + o)),
]


DENSE = [case for case in METHODS if not case.method.of_quantised]
"""The rows that a run on a dense base can take."""


def hint_for(method: AbstractMethod, grad: Any, stack_axes: int) -> sx.Hint:
    """Everything that a method may start from: a gradient of the kernel's shape, and statistics of random inputs.

    Ranks stay as they are, so that parameters can be counted.
    """
    if has_policy(method):
        # The statistics are for ranks up to this one.
        method = dataclasses.replace(method, rank=4)
    stack, fan_in = tuple(grad.shape[:stack_axes]), math.prod(grad.shape[stack_axes:-1])
    inputs = _inputs(method, stack, (fan_in, grad.shape[-1])) if "inputs" in method.needs else None
    return sx.Hint(grad=grad, inputs=inputs)


def context_for(methods: Iterable[AbstractMethod], x: Any, key: Any = None) -> sx.Context:
    """What methods read beside `x` (..., in): those that act on some tokens alone act on all of them here."""
    return sx.Context(
        key, invocations={invocation: jnp.ones(x.shape[:-1], bool) for invocation in invocations(methods)}
    )


@functools.cache
def _inputs(method: AbstractMethod, stack: tuple[int, ...], shape: tuple[int, int]) -> Any:
    def batch() -> Inputs:
        draw = np.random.default_rng(7)
        scales = np.linspace(1.0, 2.0, shape[0], dtype=np.float32)
        rows = scales * draw.standard_normal((math.prod(stack), 2, 40, shape[0]), np.float32)
        return Inputs({"kernel": rows}, np.ones((2, 40), bool), np.ones((2, 40), bool))

    (hint,) = statistics([Site("kernel", method, stack, shape, 1, 0)], lambda paths: [batch]).values()
    return hint.inputs


def hint_of_layer(hint: sx.Hint, layer: int) -> sx.Hint:
    """The part of a stacked hint that belongs to one layer."""
    inputs = None if hint.inputs is None else {name: leaf[layer] for name, leaf in hint.inputs.items()}
    return sx.Hint(grad=hint.grad[layer], inputs=inputs)


PROCEDURES: dict[str, tuple[AbstractProcedure, AbstractMethod]] = {
    "COLA": (sx.COLA(every=2), sx.SBoRA(rank=4)),
    "COLA-ranks": (sx.COLA(every=2, ranks=(4, 2, 1)), sx.LoRA(rank=4, alpha=8.0, dropout=0.1)),
    "XGBLoRA": (sx.XGBLoRA(every=2, layers=1), sx.LoRA(rank=1, dropout=0.1)),
    "LoRAPrune": (sx.LoRAPrune(warmup=0.0, cooldown=0.3, every=1, protect=0.0), sx.LoRA(rank=2)),
    "LoRAPrune-magnitude": (sx.LoRAPrune(warmup=0.0, every=2, metric="magnitude"), sx.AdaLoRA(rank=2)),
    "LoRAPrune-random": (sx.LoRAPrune(warmup=0.0, every=2, protect=0.0, metric="random"), sx.LoRA(rank=2)),
    "LoRAPrune-grad": (sx.LoRAPrune(warmup=0.0, every=2, protect=0.0, metric="grad"), sx.SBoRA(rank=2)),
    "AdaLoRABudget": (sx.AdaLoRABudget(target=2, warmup=1, cooldown=1, every=2), sx.AdaLoRA(rank=4)),
    "PRILoRAPruning": (sx.PRILoRAPruning(every=4), sx.PRILoRA(rank=sx.LinearRanks(2, 4))),
    "PRILoRAPruning-mask": (
        sx.PRILoRAPruning(every=2),
        sx.PRILoRA(rank=2, persistent_mask=True, dropout=0.1),
    ),
}
"""One row a procedure: runs of seven steps in which it acts, with the method of every projection."""

DECLARED = (
    "rewrites_base", "identity_at_init", "no_merge", "materialises", "ragged", "needs", "sends", "linked"
)  # fmt: skip


def varied(cases: list[Case]) -> list[Case]:
    """The first rows that have every declaration of a method both ways, where there is a method that has."""
    rows, declarations = [], set()
    for case in cases:
        declared = {(name, bool(getattr(case.method, name))) for name in DECLARED}
        if not declared <= declarations:
            rows.append(case)
            declarations |= declared
    return rows


FEW = varied(METHODS)
"""What the quick tests take for all."""
FIRST = [*FEW, *{type(case.method): case for case in reversed(METHODS)}.values()]
"""`FEW` and the first row of every class. The nightly run also takes the rows of other options."""
