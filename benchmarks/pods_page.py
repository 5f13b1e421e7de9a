"""docs/performance.md, made from the stored steps: python -m benchmarks.pods page"""

import json
from typing import Any

from benchmarks.pods import (
    CHIPS_OF_A_SLICE,
    LENGTH,
    MESHES,
    OPTIONS,
    SLICES,
    Pod,
    held,
    least_flops,
    least_sent,
    pods,
    roofline_of,
    utilisation,
)
from sborax.plans.roofline import CHIPS

GIB = 2**30
INTRODUCTION = f"""# Performance on TPU pods

The training step of LLaMA on slices of {CHIPS_OF_A_SLICE} TPU chips, compiled with libtpu and without a TPU. FLOPs,
bytes and memory are read from the compiled programs. **Nothing on this page has run on a TPU**: times are the least
that a chip's published rates allow, and a real step takes longer. This page is made by `python -m benchmarks.pods page`
from `benchmarks/pods.jsonl`, and `python -m benchmarks.pods compile` adds what is missing there.

Every step: bfloat16, or an NF4 base where the method's name begins with Q; LoRA rank 16, SBoRA and Bone rank 32, on all
seven projections; rows of {LENGTH:,} tokens; attention by splash.
"""

RATES = """## Chips

As Google Cloud's documentation of [v5e](https://cloud.google.com/tpu/docs/v5e),
[v5p](https://cloud.google.com/tpu/docs/v5p) and [v6e](https://cloud.google.com/tpu/docs/v6e) states them. ICI is what a
chip's links carry in one direction.
"""

LAYOUTS = """## Meshes and options

On v5e the compiler gathers kernels beside products by default. On v5p and v6e it does so with the two options below,
which run gathers on the chips' SparseCores; without them nothing is sent beside products there. In a run they go into
the environment variable `LIBTPU_INIT_ARGS`, each as `--option=true`. On v5p:4x8x8 an axis of 256 chips spans all three
dimensions of the torus, and then every gather is sent as an all-reduce, which is received twice; an axis of 64 spans
two, so the mesh has a data axis of 4, and trained leaves and the optimiser's state are cut over 64 chips.
"""

COSTS = """## What a step costs

For each chip. "FLOPs" are those of matrix products over the least: 4N + 6 for each trained parameter and token.
Attention's kernels are on neither side. `remat="full"` runs the forward pass of a layer again up to the input of
`down_proj`, which for LLaMA-3.1-70B makes 1.357 times the least.
"HBM" is an estimate: every operation reads its operands and writes its results once. "Sent" are results of
collectives, over the least: kernels as they are stored, twice; trained leaves twice in bfloat16, and their gradients
once in float32. Loops count by their turns. "Held" is arguments and temporaries.
"""

TIMES = """## Roofline

The least seconds of a step for what a chip computes, moves and receives. They may overlap, so the largest is the least
time of a step. Computing includes attention's kernels, without what their mask leaves out. An all-reduce is received
twice, as sums and as their result. Utilisation is 4N FLOPs a token over the chip's peak, if a step took exactly that
largest time.
"""

SENT = """## What is sent

GB on each chip, by kind of collective. The compiler gathers some kernels in pieces, as permutes, which are among
"others". "Beside products" is the share that is sent while the chip multiplies: in the compiled schedule a product or a
kernel lies between the start and the end of the collective, or in one fusion with a piece of it. Whether the product
takes as long is not in the schedule.
"""

OTHERS = """## Measured by others

What full training of dense decoders on TPU slices has reached, by the programs' own reports. It counts 6N FLOPs a token
and attention, and was measured; the numbers above count 4N, and are bounds.

| program | model | slice | utilisation |
|---|---|---|---|
| MaxText | 16B | v5e-256 | 61.1% |
| MaxText | 32B | v5e-256 | 66.9% |
| MaxText | 64B | v5e-256 | 59.9% |
| MaxText | 128B | v5e-256 | 56.1% |
| MaxText | 128B | v5p-256 | 68.7% |
| Levanter | 13B | v3-256 | 54.4% |
| Levanter | 20B | v3-256 | 50.9% |
| Levanter | 65B | v3-256 | 44.6% |

MaxText: its [README](https://github.com/google/maxtext) of 2024, "Runtime Performance Results". Levanter: the
text of its release in its [changelog](https://data.safetycli.com/packages/pypi/levanter/changelog).
"""


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(columns)}", *lines[1:]]) + "\n"


def page(stored: dict[str, dict[str, Any]]) -> str:
    """The whole page.

    - stored: the stored line of each step, by name.
    """
    results = [(pod, stored[pod.name]["result"]) for pod in pods() if pod.name in stored]
    done = [(pod, result) for pod, result in results if "refused" not in result]
    rates = [
        [name, SLICES[name], f"{chip.flops / 1e12:.0f}", f"{chip.memory / GIB:.0f}", f"{chip.bandwidth / 1e9:,.0f}"]
        + [f"{chip.links / 1e9:.0f}"]
        for name, chip in CHIPS.items()
    ]
    parts = [
        INTRODUCTION,
        RATES,
        table(["chip", "slice", "TFLOP/s", "HBM GiB", "HBM GB/s", "ICI GB/s"], rates),
        LAYOUTS,
        table(
            ["slice", "mesh", "options of the compiler"],
            [
                [SLICES[name], f"`{json.dumps(MESHES[name])}`", ", ".join(f"`{option}`" for option in OPTIONS[name])]
                for name in SLICES
            ],
        ),
        COSTS,
        table(
            ["model", "slice", "rows", "remat", "method", "FLOPs over least", "HBM GB", "sent GB", "over least"]
            + ["arguments GiB", "temporaries GiB", "held GiB", "of HBM"],
            [_cost(pod, result) for pod, result in done],
        ),
        TIMES,
        table(
            ["model", "slice", "method", "compute s", "HBM s", "ICI s", "largest", "utilisation at 4N, at most"],
            [_time(pod, result) for pod, result in done],
        ),
        SENT,
        table(
            ["model", "slice", "method", "all-gather", "all-reduce", "others", "beside products"],
            [_sent(*pair) for pair in done],
        ),
        OTHERS,
    ]
    refused = [[*_names(pod), pod.remat, result["refused"]] for pod, result in results if "refused" in result]
    if refused:
        parts += ["## What does not fit\n", table(["model", "slice", "method", "remat", "the compiler says"], refused)]
    missing: dict[str, list[str]] = {}
    for pod in pods():
        if pod.name not in stored:
            setting = f"{pod.shape} on {SLICES[pod.chip]}, {pod.rows} x {LENGTH:,} tokens, `remat={pod.remat}`"
            missing.setdefault(setting, []).append(pod.method)
    if missing:
        lines = [f"- {setting}: {', '.join(methods)}\n" for setting, methods in missing.items()]
        parts += ["## Not compiled yet\n", "".join(lines)]
    versions = {(line["versions"]["jax"], line["versions"]["libtpu"]) for line in stored.values()}
    parts.append(f"Compiled with {'; '.join(f'jax {jax}, libtpu {libtpu}' for jax, libtpu in sorted(versions))}.\n")
    return "\n".join(parts)


def _names(pod: Pod) -> list[str]:
    return [pod.shape, SLICES[pod.chip], pod.method]


def _cost(pod: Pod, result: dict[str, Any]) -> list[str]:
    sent, trained = sum(result["sent_bytes"].values()), result["trained"]
    share = held(result) / CHIPS[pod.chip].memory
    return [
        pod.shape,
        SLICES[pod.chip],
        str(pod.rows),
        pod.remat,
        pod.method,
        f"{result['matmul_flops'] / least_flops(pod, trained):.3f}",
        f"{result['hbm_bytes'] / 1e9:.0f}",
        f"{sent / 1e9:.1f}",
        f"{sent / least_sent(pod, trained):.2f}",
        f"{result['argument_bytes'] / GIB:.2f}",
        f"{result['temporary_bytes'] / GIB:.2f}",
        f"{held(result) / GIB:.2f}",
        f"{100 * share:.0f}%",
    ]


def _time(pod: Pod, result: dict[str, Any]) -> list[str]:
    times = roofline_of(pod, result)
    seconds = [f"{value:.3f}" for value in (times.compute, times.memory, times.links)]
    bound = {"compute": "compute", "memory": "HBM", "links": "ICI"}[times.bound]
    return [*_names(pod), *seconds, bound, f"{100 * utilisation(pod, result):.0f}%"]


def _sent(pod: Pod, result: dict[str, Any]) -> list[str]:
    sent = dict(result["sent_bytes"])
    kinds = [sent.pop("all-gather", 0), sent.pop("all-reduce", 0), sum(sent.values())]
    beside = sum(result["overlapped_bytes"].values()) / sum(result["sent_bytes"].values())
    return [*_names(pod), *(f"{size / 1e9:.2f}" for size in kinds), f"{beside:.0%}"]
