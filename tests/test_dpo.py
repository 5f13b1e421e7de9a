"""`examples/dpo.py`: the loss and its gradient are TRL's, and the loop learns and goes on where it ended."""

import copy
import json
import runpy
import warnings

import datasets
import jax
import numpy as np
import peft
import pytest
from pages import ROOT
from tiny_model import tokenizer, write_model
from torch_pair import build, shake
from trl import DPOConfig, DPOTrainer

import sborax as sx
from sborax.interop.peft import load_peft
from sborax.layout.state import take_apart

DPO, experiment, train = (runpy.run_path(str(ROOT / "examples" / "dpo.py"))[n] for n in ("DPO", "experiment", "train"))
PAIRS = [
    {"prompt": "two and two?", "chosen": " four", "rejected": " five or so"},
    {"prompt": "is ice cold?", "chosen": " yes, it is", "rejected": " no"},
]


@pytest.fixture(scope="module")
def beside_trl(tmp_path_factory):
    """TRL's loss, its gradients as an adapter of ours, our model with the same adapter, and TRL's batch."""
    place = tmp_path_factory.mktemp("trl")
    with warnings.catch_warnings():
        # TRL and transformers warn of each other.
        warnings.simplefilter("ignore")
        pair = build(place / "model", vocab_size=258)
        modules = ["q_proj", "v_proj", "down_proj"]
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, task_type="CAUSAL_LM")
        arguments = DPOConfig(
            str(place / "out"), beta=0.3, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[]
        )
        data = datasets.Dataset.from_list(PAIRS)
        # Of an adapter that is there before, TRL would take the start as the reference, and not the base.
        trainer = DPOTrainer(
            copy.deepcopy(pair.torch), args=arguments, train_dataset=data, processing_class=tokenizer(),
            peft_config=config,
        )  # fmt: skip
        shake(trainer.model)
        trainer.model.save_pretrained(place / "adapter")
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(PAIRS))])
        loss = trainer._compute_loss(trainer.model.eval(), inputs, False)
        loss.backward()
        slopes = copy.deepcopy(trainer.model)
    for parameter, slope in zip(slopes.parameters(), trainer.model.parameters(), strict=True):
        if slope.grad is not None:
            parameter.data = slope.grad.clone()
    slopes.save_pretrained(place / "slopes")
    ours = pair.ours
    params, adapters = load_peft(place / "adapter", ours)
    return float(loss.detach()), load_peft(place / "slopes", ours)[1], ours, params, adapters, inputs


def alternating(inputs):
    """TRL's batch of chosen rows before rejected ones, as pairs of rows."""
    order = np.arange(4).reshape(2, 2).T.reshape(-1)
    tokens, mask, counts = (inputs[name].numpy()[order] for name in ("input_ids", "attention_mask", "completion_mask"))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": mask[:, :-1]}
    return {n: v.astype(np.int32)[None] for n, v in batch.items()} | {"counts": counts[None, :, 1:] > 0}


def test_loss_and_gradient_are_those_of_trl(beside_trl):
    loss, slopes, model, params, adapters, inputs = beside_trl
    batch = alternating(inputs)
    parts = take_apart(params, adapters)
    sums, grads = jax.jit(
        lambda train: sx.forward_backward(
            model, train, parts.frozen, parts.base, batch, jax.random.key(0), DPO(beta=0.3)
        )
    )(parts.train)
    assert abs(loss - np.log(2)) > 1e-3
    np.testing.assert_allclose(sums.losses["loss"] / sums.items, loss, rtol=1e-4)
    expected = jax.tree.leaves(sx.split(slopes)[0])
    for ours, theirs in zip(jax.tree.leaves(grads["adapters"]), expected, strict=True):
        assert np.abs(theirs).max() > 1e-4
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_the_example_learns_and_goes_on(tmp_path):
    write_model(tmp_path / "model")
    lines = [json.dumps(pair | {"prompt": f"{pair['prompt']} {n}"}) for n in range(4) for pair in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    settings = experiment(str(tmp_path / "model"), tmp_path / "pairs.jsonl", 6, 1e-2, 64)
    losses = train(settings, tmp_path / "run")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < losses[0] - 0.05
    assert train(settings, tmp_path / "run") == []
    assert sx.load_adapter(tmp_path / "run" / "adapter", sx.load_model(tmp_path / "model").params)


def test_a_base_that_changes_is_no_reference(beside_trl):
    _, _, model, params, _, inputs = beside_trl
    batch = alternating(inputs)
    params, adapters = sx.attach(jax.random.key(0), params, [("q_proj", sx.PiSSA(rank=2))])
    parts = take_apart(params, adapters)
    with pytest.raises(sx.SboraxError, match=r"q_proj/kernel: changes in this run, so that the base is no reference"):
        sx.forward_backward(model, parts.train, parts.frozen, parts.base, batch, jax.random.key(0), DPO())
