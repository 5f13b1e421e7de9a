"""The same training by PEFT and here: one start, one list of batches, one optimiser in two libraries, two curves."""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import numpy as np
import peft
import pytest
import torch
from tiny_model import tokenizer
from torch_pair import Pair, build

import sborax as sx
from sborax.adapters.core import AbstractMethod
from sborax.adapters.leaves import flatten
from sborax.adapters.tree import Adapters, Params, nodes
from sborax.data.batches import Batch, Batches
from sborax.interop.peft import load_peft
from sborax.interop.peft_table import TABLE
from sborax.models.load import load_model
from sborax.procedures import AbstractProcedure
from sborax.train.experiment import Also
from sborax.train.read import silent

STEPS, WARMUP, DECAY, CLIP = 50, 5, 0.05, 1.0
TARGETS = "q_proj|down_proj"
QUESTIONS = [{"q": f"{a} plus {b}?", "a": f"{a + b}."} for a in range(6) for b in range(6)]


def cosine(step: int) -> float:
    """The learning rate over its peak. transformers' warm-up is one step behind; after it, both are the same."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """An optimiser with its schedule, here and in torch.

    - ours, theirs: the optimiser; `theirs` makes it for PEFT's model.
    - factor: the learning rate over its peak, by the number of steps made.
    - accumulate: microbatches of a step.
    - procedure: acts between our steps.
    - after: what PEFT does there, given its model and the number of steps made.
    """

    ours: sx.AbstractScheduled | sx.Optimizer
    theirs: Callable[[Any], torch.optim.Optimizer]
    factor: Callable[[int], float] = cosine
    accumulate: int = 1
    procedure: AbstractProcedure | None = None
    after: Callable[[Any, int], None] = lambda model, step: None


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adamw(lr: float = 1e-2, decay: float = DECAY) -> Recipe:
    return Recipe(
        sx.AdamW(lr=lr, schedule="cosine", warmup=WARMUP, decay=decay, clip=CLIP),
        lambda model: torch.optim.AdamW(trained(model), lr=lr, weight_decay=decay),
    )


Start = Callable[[Pair, "Case", Sequence[Batch], Path], tuple[Any, Params, Adapters]]
"""Makes PEFT's model before training, and our parameters and adapters of the same function."""


def of_peft(pair: Pair, case: "Case", batches: Sequence[Batch], directory: Path) -> tuple[Any, Params, Adapters]:
    """PEFT's own start, which we read from its files."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(pair.torch), copy.deepcopy(case.config))
    params, adapters = read(pair, model, directory)
    check_alike(prepared(pair, case).attach(pair.ours.params)[1], adapters)
    return model, params, adapters


def of_file(pair: Pair, model: Any, directory: Path) -> dict[str, Any]:
    """The trained leaves of PEFT's model, which we read from its files."""
    params, adapters = read(pair, model, directory)
    start, end = flatten(pair.ours.params), flatten(params)
    # Beside adapters, biases alone: a method may have changed kernels, too.
    changed = {
        path: leaf for path, leaf in end.items() if leaf is not start[path] and (not adapters or path.endswith("/bias"))
    }
    return {**leaves_of(adapters), **changed}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method with its settings, in PEFT and as our users write them.

    - method: None for no adapters.
    - also: what is trained of the base. tokens: those whose vectors are.
    - targets: the pattern of our rule.
    - leaves: our leaves of PEFT's model after training, by kernel.
    - patch: changes PEFT where it does not compute what it says; each says why.
    """

    config: peft.PeftConfig
    method: AbstractMethod | None
    recipe: Recipe = adamw()
    also: tuple[Also, ...] = ()
    start: Start = of_peft
    leaves: Callable[[Pair, Any, Path], dict[str, Any]] = of_file
    patch: Callable[[pytest.MonkeyPatch], None] = lambda monkeypatch: None
    targets: str = TARGETS
    tokens: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Curve:
    """A training run: the loss of every step, and the trained leaves after the last, by path."""

    losses: np.ndarray
    leaves: Mapping[str, Any]


def with_tokenizer(directory: Path, **changes: Any) -> Pair:
    pair = build(directory, vocab_size=258, **changes)
    tokenizer().save_pretrained(directory)
    return pair._replace(ours=load_model(directory))


def experiment(pair: Pair, case: Case) -> sx.Experiment:
    return sx.Experiment(
        str(pair.path),
        sx.Data(QUESTIONS, template="{q} ", answer="{a}", max_length=16, buckets=(16,)),
        [] if case.method is None else [(case.targets, case.method)],
        train_also=case.also,
        train_tokens=case.tokens,
        optimizer=case.recipe.ours,
        steps=STEPS,
        batch_size=4,
        accumulate=case.recipe.accumulate,
        procedure=case.recipe.procedure,
        hint_batches=4,
    )


def prepared(pair: Pair, case: Case) -> sx.Prepared:
    return sx.prepare(experiment(pair, case), pair.ours, STEPS)


def batches_of(pair: Pair, case: Case) -> Batches:
    return sx.read_data(experiment(pair, case), pair.ours, silent)[0]


def read(pair: Pair, model: Any, directory: Path) -> tuple[Params, Adapters]:
    """PEFT's adapter as it is now, through its files and our reader."""
    model.save_pretrained(directory)
    return load_peft(directory, pair.ours)


def leaves_of(adapters: Adapters) -> dict[str, Any]:
    return {path: node.train for path, node in nodes(adapters).items()}


def our_curve(run: sx.Prepared, params: Params, adapters: Adapters, batches: Sequence[Batch]) -> Curve:
    """The loop of docs/own_loop.md, from a start that is given."""
    parts = run.take_apart(params, adapters)
    state, step = run.start(parts), run.make_step()
    losses = []
    for number, batch in enumerate(batches, start=1):
        state, numbers = step(state, parts.frozen, parts.base, batch)
        losses.append(float(numbers["loss"]))
        if run.procedure is not None and run.procedure.due(number):
            state, parts = run.procedure.apply(number, state, parts, run.tx)
    leaves = leaves_of(sx.combine(state.train["adapters"], parts.frozen))
    return Curve(np.array(losses), {**leaves, **state.train["base"]})


def labelled(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Our microbatches as transformers takes them: whole rows, and labels of -100 where a token does not count."""
    rows = []
    names = ("tokens", "targets", "counts", "segments")
    for tokens, targets, counts, segments in zip(*(batch[name] for name in names), strict=True):
        inputs = np.concatenate([tokens[:, :1], targets], axis=1)
        labels = np.where(np.pad(counts, ((0, 0), (1, 0))), inputs, -100)
        mask = np.pad(segments > 0, ((0, 0), (1, 0)), constant_values=True)
        arrays = {"input_ids": inputs, "labels": labels, "attention_mask": mask}
        rows.append({name: torch.tensor(array, dtype=torch.long) for name, array in arrays.items()})
    return rows


def with_answers(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs of a microbatch, and labels of -100 where they belong to no answer."""
    counts = np.pad(batch["counts"], ((0, 0), (1, 0)))[:, :-1]
    labels = np.where(counts, batch["tokens"], -100)
    arrays = {"input_ids": batch["tokens"], "attention_mask": batch["segments"], "labels": labels}
    return {name: torch.tensor(np.asarray(array, np.int64)) for name, array in arrays.items()}


def entropy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum over labels that count: the model's loss, without the regulariser that AdaLoRA adds to it."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))


def their_losses(model: Any, recipe: Recipe, batches: Sequence[Batch]) -> np.ndarray:
    """Trains `model` as transformers' Trainer does: mean loss of a step's labels, clipping, step, schedule."""
    model.train()
    optimizer, clip = recipe.theirs(model), recipe.ours.clip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.factor)
    losses = []
    for number, batch in enumerate(batches, start=1):
        items, total = int(batch["counts"].sum()), 0.0
        for rows in labelled(batch):
            outputs = model(**rows, num_items_in_batch=items)
            outputs.loss.backward()
            total += entropy(outputs.logits.detach(), rows["labels"])
        losses.append(total / items)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(trained(model), clip)
        optimizer.step()
        schedule.step()
        recipe.after(model, number)
        optimizer.zero_grad()
    return np.array(losses)


def check_alike(ours: Adapters, theirs: Adapters) -> None:
    """Raise AssertionError unless both have the same structure and scales: the settings mean the same."""
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)
    # What PEFT multiplies into a tensor may be shared out between that tensor and the scale in any way.
    absorbed = {row.method for row in TABLE for tensor in row.tensors if tensor.times}
    for path, node in nodes(ours).items():
        if "scale" in node.frozen and type(node.method) not in absorbed:
            # PEFT's AdaLoRA adds 1e-5 to the rank by which it divides.
            chex.assert_trees_all_close(nodes(theirs)[path].frozen["scale"], node.frozen["scale"], rtol=1e-5)


def curves(pair: Pair, case: Case, directory: Path) -> tuple[Curve, Curve]:
    """Ours and PEFT's."""
    sequence = batches_of(pair, case)
    batches = [sequence[step] for step in range(STEPS)]
    model, params, adapters = case.start(pair, case, batches, directory / "start")
    losses = their_losses(model, case.recipe, batches)
    leaves = case.leaves(pair, model, directory / "trained")
    return our_curve(prepared(pair, case), params, adapters, batches), Curve(losses, leaves)
