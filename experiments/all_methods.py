"""Run every method and write the table docs/runs.md: python -m experiments.all_methods SMALL LARGE DATA

SMALL and LARGE are LLaMAs (directory, hub id or .gguf file); DATA is a data set with columns instruction and output.
Each row is a whole run as `sborax train` makes it, with the same steps and batches: every method on SMALL, and 4-bit
bases on LARGE, whose widths are multiples of their blocks. `--only "LoRA;Bone"` makes only these rows again. Step times
are medians over those of LoRA's step, in turn in one process. Temporaries are those of the compiled step.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

import sborax as sx
from benchmarks.runner import Runner, in_turn, time_ratio
from sborax.train.begin import begin
from sborax.train.loop import train
from sborax.train.prepare import prepare
from sborax.train.read import read_data, read_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "runs.md"
LINEARS = "self_attn|mlp"
TIMED = 9


@dataclasses.dataclass(frozen=True)
class Scene:
    """The settings that all rows on one model share."""

    steps: int
    batch_size: int
    length: int
    samples: int | None = None

    def described(self, model: str) -> str:
        """The heading of a table."""
        repeated = "" if self.samples is None else f", {self.samples} of them again and again"
        rows = f"{self.steps} steps of {self.batch_size} samples of at most {self.length} tokens{repeated}"
        return f"## {Path(model).name}: {rows}"


# The large model knows this kind of text. Within so few steps its loss only falls on samples that are repeated.
SMALL, LARGE = Scene(40, 4, 256), Scene(24, 4, 128, 48)


@dataclasses.dataclass(frozen=True)
class Arm:
    """What one row changes in the common experiment."""

    name: str
    method: Any
    lr: float = 3e-3
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)


RESPONSE = (38, 38, 38, 410, 461, 406, 427, 289, 372, 467)
"""The tokens of "### Response:", with which a prompt ends, by the tokenizer of stories260K."""
ARMS = [
    Arm("LoRA", sx.LoRA(rank=8, alpha=16.0)),
    Arm("rsLoRA", sx.LoRA(rank=8, alpha=16.0, rslora=True)),
    Arm("QALoRA", sx.QALoRA(rank=8, group=4)),
    Arm("BDLoRA", sx.BDLoRA(rank=8, blocks=4, alpha=16.0)),
    Arm("MonteCLoRA", sx.MonteCLoRA(rank=8, alpha=16.0)),
    Arm("VeLoRA", sx.VeLoRA(rank=8, alpha=16.0, groups=16)),
    Arm("aLoRA", sx.Activated(sx.LoRA(rank=8, alpha=16.0), RESPONSE)),
    Arm("GraLoRA", sx.GraLoRA(rank=8, alpha=16.0)),
    Arm("LoRA, LoRA+ (b 16 times as fast)", sx.LoRA(rank=8, alpha=16.0), 5e-4, optimizer={"b_ratio": 16.0}),
    Arm("LoRA, LoRA-FA", sx.LoRA(rank=8, alpha=16.0), optimizer={"name": "lora_fa"}),
    Arm("LoRA, LoRA-RITE", sx.LoRA(rank=8, alpha=16.0), optimizer={"name": "lora_rite"}),
    Arm("SBoRA-FA", sx.SBoRA(rank=16)),
    Arm("SBoRA-FB", sx.SBoRA(rank=16, variant="FB")),
    Arm("Bone", sx.Bone(rank=16), 1e-3),
    Arm("Bat", sx.Bat(rank=4), 1e-3),
    Arm("DoRA", sx.DoRA(rank=8, alpha=16.0)),
    Arm("PiSSA", sx.PiSSA(rank=8)),
    Arm("OLoRA", sx.OLoRA(rank=8)),
    Arm("LoRAGA", sx.LoRAGA(rank=8), 5e-4),
    Arm("EVA", sx.EVA(rank=8)),
    Arm("CorDA", sx.CorDA(rank=8)),
    Arm("MiCA", sx.MiCA(rank=16)),
    Arm("PiSSA, then DoRA", sx.chain(sx.PiSSA(rank=8), sx.DoRA(rank=8))),
    Arm("SARA", sx.SARA(rank=sx.SingularMass(0.25))),
    Arm("MoSARA", sx.MoSARA(rank=8, sets=5), 1e-2),
    Arm("MiLoRA", sx.MiLoRA(rank=8, alpha=16.0, top_k=3)),
    Arm("ResLoRA, block", sx.ResLoRA(rank=8, alpha=16.0)),
    Arm("ResLoRA, input", sx.ResLoRA(rank=8, alpha=16.0, shortcut="input")),
    Arm("ResLoRA, middle", sx.ResLoRA(rank=8, alpha=16.0, shortcut="middle")),
    Arm("PRILoRA", sx.PRILoRA(rank=sx.LinearRanks(4, 12)), more={"procedure": sx.PRILoRAPruning(every=20)}),
    Arm("AdaLoRA", sx.AdaLoRA(rank=12, alpha=16.0), 1e-2, more={"procedure": sx.AdaLoRABudget()}),
    Arm("COLA", sx.LoRA(rank=8, alpha=16.0), more={"procedure": sx.COLA(every=20)}),
    Arm("XGBLoRA", sx.LoRA(rank=1), more={"procedure": sx.XGBLoRA()}),
    Arm("LoRAPrune", sx.LoRA(rank=8, alpha=16.0), more={"procedure": sx.LoRAPrune(ratio=0.2)}),
    Arm("OrthogonalAdaptation", sx.OrthogonalAdaptation(rank=8)),
    Arm("DeLoRA", sx.DeLoRA(rank=8, strength=1.0), 1e-3),
    Arm("VeRA", sx.VeRA(rank=32), 1e-2),
    Arm("PVeRA", sx.PVeRA(rank=32), 1e-2),
    Arm("TinyLoRA", sx.TinyLoRA(rank=4), 1e-2),
    Arm("VBLoRA", sx.VBLoRA(rank=4, vectors=32, length=4), 1e-2),
    Arm("UniLoRA", sx.UniLoRA(rank=8, coefficients=2000), 1e-2),
    Arm("Lily", sx.Lily(rank=8, stride=2), 1e-2),
    Arm("FRoD", sx.FRoD(density=0.16)),
    Arm("RandLoRA", sx.RandLoRA(rank=32), 1e-3),
    Arm("HiRA", sx.HiRA(rank=8), 1e-2),
    Arm("GLoRA", sx.GLoRA(rank=4)),
    Arm("LoHa", sx.LoHa(rank=4, alpha=8.0)),
    Arm("LoKr", sx.LoKr(rank=8, alpha=8.0)),
    Arm("C3A", sx.C3A(block=4), 1e-2),
    Arm("FourierFT", sx.FourierFT(coefficients=1000), 3e-2),
    Arm("WaveFT", sx.WaveFT(coefficients=1000), 1e-2),
    Arm("PEANuT", sx.PEANuT(rank=8), 1e-2),
    Arm("SHiRA", sx.SHiRA(rank=8)),
    Arm("SuperTuning", sx.SuperTuning(sparsity=0.9)),
    Arm("AdaMSS", sx.AdaMSS(rank=16, subspace_rank=4), 1e-2),
    Arm("DEFT", sx.DEFT(rank=8)),
    Arm("OFT", sx.OFT(block=4)),
    Arm("OSF", sx.OSF(kept=0.8)),
    Arm("KaSA", sx.KaSA(rank=8, alpha=8.0)),
    Arm("BOFT", sx.BOFT(block=4)),
    Arm("PSOFT", sx.PSOFT(rank=32), 1e-2),
    Arm("HRA", sx.HRA(rank=8)),
    Arm("RoAd", sx.RoAd(block=4), 1e-2),
    Arm("IA3", sx.IA3(), 1e-2),
    Arm("full fine-tuning", None, 1e-3),
]
NF4 = {"quant": "nf4"}
FOUR_BIT = [
    Arm("LoRA", sx.LoRA(rank=16), 1e-3),
    Arm("QLoRA (NF4)", sx.LoRA(rank=16), 1e-3, more=NF4),
    Arm("QSBoRA-FA (NF4)", sx.SBoRA(rank=32), 1e-3, more=NF4),
    Arm("QBone (NF4)", sx.Bone(rank=32), 1e-3, more=NF4),
    Arm("LoftQ (NF4)", sx.LoftQ(rank=16), 1e-3, more=NF4),
    Arm("QPiSSA (NF4)", sx.PiSSA(rank=16, niter=4), 1e-3, more=NF4),
]


def experiment(arm: Arm, scene: Scene, model: str, data: str) -> sx.Experiment:
    """The common experiment with the changes of `arm`."""
    rules = () if arm.method is None else (sx.Rule(LINEARS, arm.method),)
    return sx.Experiment(
        model=model,
        data=sx.Data(data, template="alpaca", max_length=scene.length, limit=scene.samples),
        rules=rules,
        train_base=arm.method is None,
        optimizer=sx.Optimizer(lr=arm.lr, schedule="cosine", **arm.optimizer),
        steps=scene.steps,
        batch_size=scene.batch_size,
        **arm.more,
    )


def step_of(experiment: sx.Experiment, folder: epath.Path) -> Runner:
    """The compiled step of an experiment on its first batch, set up as in a run."""
    model = read_model(experiment)
    batches, _ = read_data(experiment, model, lambda _: None)
    assert experiment.steps is not None
    # Starts that choose ranks write these down.
    folder.mkdir()
    prepared = prepare(experiment, model, experiment.steps, folder)
    prepared, parts = begin(prepared, model, batches, folder, lambda _: None)
    return Runner.of(prepared.make_step(), prepared.start(parts), parts.frozen, parts.base, batches[0])


def run(settings: sx.Experiment, reference: Runner | None) -> tuple[dict[str, Any], Runner]:
    """One row: a whole run in a temporary directory, then its step in turn with the reference's."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = epath.Path(temporary)
        summary = train(settings, folder / "run", echo=lambda _: None)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        step = step_of(settings, folder / "again")
    lines = [line for line in lines if "loss" in line]
    losses = [line["loss"] for line in lines]
    row = {
        "trained": summary.trainable_parameters,
        "first": statistics.mean(losses[:10]),
        "last": statistics.mean(losses[-10:]),
        "ratio": 1.0 if reference is None else time_ratio(*in_turn(step, reference, TIMED)),
        "temp": step.temporaries,
    }
    return row, step


HEAD = [
    "| method | lr | trained | loss, first 10 steps | last 10 | step over LoRA's | temporaries, MiB |",
    "|---|---|---|---|---|---|---|",
]


def table(arms: list[Arm], names: list[str], scene: Scene, model: str, data: str, before: dict[str, str]) -> list[str]:
    """The lines of one table. Wanted rows are measured and printed as they come; the others are taken from `before`."""
    lines, reference = list(HEAD), None
    for arm in arms:
        if arm.name not in names:
            lines += [before[arm.name]] if arm.name in before else []
            continue
        settings = experiment(arm, scene, model, data)
        if reference is None and arm is not arms[0]:
            with tempfile.TemporaryDirectory() as temporary:
                reference = step_of(experiment(arms[0], scene, model, data), epath.Path(temporary) / "reference")
        row, step = run(settings, reference)
        reference = reference or step
        fell = "" if row["last"] < row["first"] else " (did not fall)"
        lines.append(
            f"| {arm.name} | {arm.lr:g} | {row['trained']:,} | {row['first']:.3f} | {row['last']:.3f}{fell} "
            f"| {row['ratio']:.2f} | {row['temp'] / 2**20:.1f} |"
        )
        print(lines[-1], flush=True)
        jax.clear_caches()
    return lines


def written(heading: str) -> dict[str, str]:
    """The rows under a heading of the page, by name."""
    _, _, below = PAGE.read_text().partition(heading + "\n") if PAGE.exists() else ("", "", "")
    rows = below.partition("\n## ")[0].splitlines()
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows if row.startswith("| ")}


def main() -> None:
    """Run the rows and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small")
    parser.add_argument("large")
    parser.add_argument("data")
    parser.add_argument("--only", help="rows to measure again, separated by semicolons (default: all)")
    args = parser.parse_args()
    blocks = []
    for arms, scene, model in ((ARMS, SMALL, args.small), (FOUR_BIT, LARGE, args.large)):
        names = args.only.split(";") if args.only else [arm.name for arm in arms]
        heading = scene.described(model)
        blocks += [heading, "\n".join(table(arms, names, scene, model, args.data, written(heading)))]
    about = (
        f"Made by `python -m experiments.all_methods` on {datetime.date.today().isoformat()}, on "
        f"`{Path(args.data).name}`, in float32 on a CPU, with all seven linears of every layer adapted. There is one "
        "seed and one learning rate for each method. The tables show that each method trains through the same loop, "
        "and what its step costs. They do not rank methods."
    )
    PAGE.write_text("\n\n".join(["# Every method in a run", about, *blocks]) + "\n")


if __name__ == "__main__":
    main()
