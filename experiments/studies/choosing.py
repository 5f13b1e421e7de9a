"""The text of docs/choosing.md: what each method gains and costs, by its declarations and the results of the atlas."""

import textwrap

from experiments.studies.claims import paired, rate_cost
from experiments.studies.report import Outcome, ranked, reference_of, signed
from experiments.studies.study import settings
from experiments.studies.tuning import Tuned
from sborax.adapters.core import AbstractFactored, AbstractMethod
from sborax.adapters.depth import AbstractLinked
from sborax.adapters.paths import as_rules
from sborax.interop.peft_table import PLAIN, TABLE

STARTS = {"grad": "starts from gradients", "inputs": "starts from inputs"}
"""What a method needs before the first step, by field of `Hint`."""
TEXT = """\
# Choosing a method

Most methods of LoRA's size end near it once the learning rate is right, and a wrong learning rate costs more than \
most choices of a method. In the [atlas](RESULTS.md), {near} of {count} arms end within {band} nats a token of \
LoRA's loss on E2E. LoRA itself loses {below:.3f} half a decade below its best rate, and {above:.3f} half a decade \
above it. So search the rate of each method first ([sweeps](sweeps.md)):

```bash
# not run in the tests: it trains three adapters or more
sborax sweep experiments/sbora_smollm2.py optimizer.lr=auto --out runs/rates
```

Then choose by what a method costs and by where its adapter goes:

- **Take `LoRA` unless you have a reason for another method.** It is near the best here, and other libraries read it.
- **Small files.** The methods below with the fewest trained parameters are {smallest}. Each ends far above LoRA \
here.
- **Half of LoRA's parameters at its rank.** `SBoRA`, `Bone` and the optimiser LoRA-FA train one factor.
- **Memory and time of a step.** {matrix_methods} form a matrix of the weight's size for every projection. [Every \
method in a run](runs.md) has times and memory.
- **A mesh.** Methods marked "sends more" exchange more than LoRA between the devices that share a projection. \
[`sborax plan`](plans.md) counts it.
- **A 4-bit base.** All methods take one. Those that rewrite the base, such as `PiSSA`, quantise what is left of it.
- **Merging.** With default options, all methods merge exactly into a dense weight, except {input_methods}, whose \
change depends on the input.
- **Experts that are added later.** Blocks of `SBoRA` and of `OrthogonalAdaptation` do not interfere \
([merging](merging.md)).
- **Other libraries.** The last column is what `sborax export` writes. `LORA` is exact for methods that PEFT lacks.

## All methods

The table has the loss minus LoRA's in nats a token, with 95 % intervals over seeds, at the best learning rate of \
each method, on a model of 260 thousand parameters after 100 steps. Parameters are matched to LoRA's where a method \
can. **A larger model or a longer run may order methods otherwise.** Full fine-tuning is at {full}.

![Differences from LoRA on E2E, with intervals over items and over seeds](results/atlas-E2E-differences.svg)

| method | trained | E2E | Alpaca | step and start | merges | sends more | PEFT's file |
|---|---|---|---|---|---|---|---|
"""
WIDTH = 120
"""Columns of a line of text."""
BAND = 0.05
"""A difference of this size or less is called near, in nats a token."""
FEWEST = 4
"""How many of the smallest methods are named."""


def choosing(outcome: Outcome) -> str:
    """The page, from the results of the atlas. Raises ValueError where its reference is not tuned."""
    first = settings(outcome.study)[0]
    reference = reference_of(outcome, first)
    if reference is None:
        raise ValueError(f"{outcome.study.reference} is not tuned on {first}")
    arms = ranked(outcome, first)
    gaps = {arm.arm.name: paired(arm, reference).seeds for arm in arms if arm is not reference}
    methods = {arm.arm.name: method for arm in arms if (method := method_of(arm)) is not None}
    smallest = sorted((arm for arm in arms if arm.arm.name in methods), key=lambda arm: arm.trained)[:FEWEST]
    matrix_methods = sorted({type(method).__name__ for method in methods.values() if method.materialises})
    input_methods = sorted({type(method).__name__ for method in methods.values() if method.no_merge})
    text = TEXT.format(
        near=sum(abs(gap.value) <= BAND for gap in gaps.values()),
        count=len(gaps),
        band=BAND,
        below=rate_cost(reference, above=False).seeds.value,
        above=rate_cost(reference, above=True).seeds.value,
        smallest=enumeration([f"{arm.arm.name} ({arm.trained:,})" for arm in smallest]),
        matrix_methods=enumeration([f"`{name}`" for name in matrix_methods]),
        input_methods=enumeration([f"`{name}`" for name in input_methods]),
        full=f"{gaps['full fine-tuning'].value:+.3f}",
    )
    others = [arm for arm in arms if arm is not reference and arm.arm.name in methods]
    rows = [row(outcome, arm, methods[arm.arm.name]) for arm in (reference, *others)]
    return "\n".join([*map(fold, text.splitlines()), *rows]) + "\n"


def fold(line: str) -> str:
    """A line of text as several that are not too long; a row of a table as it is."""
    if line.startswith("|"):
        return line
    return textwrap.fill(line, WIDTH, subsequent_indent="  " if line.startswith("- ") else "", break_on_hyphens=False)


def method_of(arm: Tuned) -> AbstractMethod | None:
    """The method of an arm; None for full fine-tuning."""
    rules = as_rules(arm.arm.experiment.rules)
    return rules[0].method if rules else None


def row(outcome: Outcome, arm: Tuned, method: AbstractMethod) -> str:
    """The line of one arm, which is tuned in the first setting."""
    name = arm.arm.name
    cells = [
        name,
        f"{arm.trained:,}",
        *(difference_cell(outcome, setting, name) for setting in settings(outcome.study)),
        step_cell(method),
        "no" if method.no_merge else "yes",
        "yes" if method.sends else "",
        file_cell(method),
    ]
    return f"| {' | '.join(cells)} |"


def difference_cell(outcome: Outcome, setting: str, name: str) -> str:
    """The difference of an arm from the reference, with its interval over seeds; empty where it was not run."""
    arm, reference = outcome.arms[setting].get(name), reference_of(outcome, setting)
    if arm is None or reference is None or arm is reference or arm.rates.best is None:
        return ""
    return signed(paired(arm, reference).seeds, decimals=3)


def step_cell(method: AbstractMethod) -> str:
    """What a step or a start does beyond two thin products."""
    marks = ["forms a matrix"] if method.materialises else []
    marks += ["draws noise"] if method.draws else []
    marks += [STARTS[need] for need in sorted(method.needs)]
    return ", ".join([*marks, *(["rewrites the base"] if method.rewrites_base else [])])


def file_cell(method: AbstractMethod) -> str:
    """PEFT's kind as which an adapter is written; empty for none."""
    kinds = [entry.peft_type for entry in TABLE if entry.method is type(method) and entry.write]
    if kinds:
        return f"`{kinds[0]}`"
    return f"`{PLAIN.peft_type}`" if isinstance(method, AbstractFactored | AbstractLinked) else ""


def enumeration(names: list[str]) -> str:
    """Names in a sentence: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
