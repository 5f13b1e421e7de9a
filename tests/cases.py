"""One row a method: what the contract suite runs it with, and the closed form of its parameter count.

Adding a method adds a row here. The suite reads what a method declares (class attributes), never its name.
"""

import dataclasses
from collections.abc import Callable

import sborax as sx
from sborax.core import AbstractMethod

IN, OUT, TOKENS, LAYERS = 128, 96, 7, 3
"""7 divides no product of the other sizes: the size of a value tells whether it is a weight."""


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    method: AbstractMethod
    count: Callable[[int, int], int]
    """Trained parameters of one (in, out) weight."""


METHODS = [
    Case("LoRA", sx.LoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("rsLoRA", sx.LoRA(rank=4, alpha=8.0, rslora=True, init_a="gaussian"), lambda i, o: 4 * (i + o)),
    Case("SBoRA-FA", sx.SBoRA(rank=5, alpha=10.0), lambda i, o: 5 * o),
    Case("SBoRA-FB", sx.SBoRA(rank=5, variant="FB"), lambda i, o: 5 * i),
    Case("Bone", sx.Bone(rank=6), lambda i, o: 6 * o),
    Case("Bone-mini", sx.Bone(rank=8, mini_rank=12), lambda i, o: 8 * 12),
    Case("Bone-contiguous", sx.Bone(rank=6, grouping="contiguous"), lambda i, o: 6 * o),
    Case("Bat", sx.Bat(rank=32), lambda i, o: 32 * o),
    Case("DoRA", sx.DoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o) + o),
    Case("PiSSA", sx.PiSSA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("PiSSA-fast", sx.PiSSA(rank=4, niter=4), lambda i, o: 4 * (i + o)),
    Case("OLoRA", sx.OLoRA(rank=4, alpha=8.0), lambda i, o: 4 * (i + o)),
    Case("SARA", sx.SARA(rank=4), lambda i, o: 4 * (i + o + 1)),
    Case("SARA-svd", sx.SARA(rank=4, factor_init="svd", alpha=8.0), lambda i, o: 4 * (i + o + 1)),
    Case("MoSARA", sx.MoSARA(rank=6, sets=3), lambda i, o: 3 * 6 + o + 6 + 3),
    Case("MoSARA-full", sx.MoSARA(rank=6, sets=3, router="full"), lambda i, o: 3 * 6 + o + 6 * 3),
    Case("chain", sx.chain(sx.PiSSA(rank=4), sx.DoRA(rank=4)), lambda i, o: 4 * (i + o) + o),
    Case("sum", sx.add(sx.LoRA(rank=3), sx.SBoRA(rank=4)), lambda i, o: 3 * (i + o) + 4 * o),
    Case("scaled", sx.scale(sx.LoRA(rank=3), 0.5), lambda i, o: 3 * (i + o)),
]
