"""The least time of a step on a TPU chip, from the FLOPs and bytes of its program."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from sborax.errors import SboraxError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates of a TPU chip, as https://cloud.google.com/tpu/docs/v5e, v5p and v6e state them.

    - flops: dense bfloat16 FLOP/s.
    - memory: bytes of HBM.
    - bandwidth: bytes/s of HBM.
    - links: bytes/s that all links to other chips (ICI) carry in one direction: 1,600, 4,800 and 3,200 Gbit/s.
    """

    flops: float
    memory: int
    bandwidth: float
    links: float


CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 600e9),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 400e9),
}
"""By the first part of a topology's name."""


def chip_name(topology: str) -> str:
    """The chip that a topology names, as `CHIPS` spells it. libtpu reads capitals, too."""
    return topology.partition(":")[0].lower()


def chip_of(topology: str) -> Chip:
    """The chip of a topology, such as "v5e:16x16".

    Raises SboraxError for a chip whose rates are not known here.
    """
    kind = chip_name(topology)
    if kind not in CHIPS:
        raise SboraxError(f"topology {topology}: the rates of {kind} are not known; those of {', '.join(CHIPS)} are")
    return CHIPS[kind]


def torus_of(topology: str) -> tuple[int, ...]:
    """The chips along each dimension of a topology's torus: (4, 8, 8) of "v5p:4x8x8".

    Raises SboraxError for another form.
    """
    match = re.fullmatch(r"\w+:(\d+(?:x\d+)*)(?:_(?:un)?twisted)?", topology)
    if not match:
        raise SboraxError(f"topology {topology}: write a chip and the sides of a slice, such as v5e:16x16")
    return tuple(int(side) for side in match.group(1).split("x"))


def sums_gathers(torus: Sequence[int], chips: int) -> bool:
    """Whether the compiler turns a gather among this many chips into an all-reduce of parts that are padded with zeros.

    It does so among all chips of a torus with three dimensions of at least 4. Among fewer chips it gathers (libtpu
    0.0.52; docs/performance.md).

    - torus: the chips along each dimension, as `torus_of` has them.
    """
    return chips == math.prod(torus) and sum(side >= 4 for side in torus) == 3


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least for each of three things, which may overlap.

    compute = FLOPs / peak; memory = bytes / HBM bandwidth; links = bytes received / the links' bandwidth
    """

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The largest of the three."""
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """Which one is the largest."""
        times = dataclasses.asdict(self)
        return max(times, key=lambda name: times[name])


def attention_flops(layers: int, width: int, rows: int, length: int, again: bool) -> int:
    """FLOPs of splash's kernels: matrix products over the half of all pairs of tokens that the causal mask leaves.

    The forward pass has 2 products. The backward pass has 7, since the kernels for queries and for keys each form
    scores and their gradients.

    - width: heads x features of a head.
    - again: whether the forward pass runs twice, as under `remat="full"`.
    """
    return (9 + 2 * again) * layers * rows * length**2 * width


def received_bytes(sent: Mapping[str, int], devices: int) -> int:
    """The bytes that reach a chip.

    An all-reduce is received twice, as parts to sum and as the result. Every device sends its part of a reduce-scatter,
    so it counts `devices` times its result.

    - sent: bytes of the results of collectives by kind.
    - devices: how many a reduce-scatter goes between.
    """
    return sum(sent.values()) + sent.get("all-reduce", 0) + (devices - 1) * sent.get("reduce-scatter", 0)


def roofline(chip: Chip, flops: int, moved: int, received: int) -> Roofline:
    """The roofline of a step.

    - flops, moved, received: FLOPs, bytes of HBM traffic, and bytes from other chips, of one chip.
    """
    return Roofline(flops / chip.flops, moved / chip.bandwidth, received / chip.links)
