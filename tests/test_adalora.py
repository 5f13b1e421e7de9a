"""AdaLoRA's budget and regulariser against PEFT's, on two weights that are stacked here."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import sborax as sx
from sborax.adapters.core import Adapter
from sborax.adapters.tree import nodes
from sborax.procedures import AdaLoRABudget, Boundary, Run
from sborax.procedures.adalora import orthogonality

RANK, STEPS, PATH = 6, 12, "layers/proj/kernel"
LEAVES = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.ModuleDict({"proj": torch.nn.Linear(10, 8, bias=False)}) for _ in range(2)])
    config = peft.AdaLoraConfig(
        init_r=RANK, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=STEPS, target_modules=["proj"]
    )
    return peft.get_peft_model(torch.nn.ModuleDict({"layers": layers}), config)


def run_of(method, weights=2):
    params = {"layers": {"proj": {"kernel": jnp.ones((weights, 10, 8))}}}
    plan = sx.plan(params, [("proj", method)])
    return Run(plan, STEPS, 1), sx.attach(jax.random.key(0), params, plan)[1]


def stacked(theirs, read):
    """Our leaves of both layers from PEFT's parameters: `read` is given each."""
    layers = [layer["proj"] for layer in theirs.base_model.model["layers"]]
    leaves = {leaf: [read(getattr(layer, name)["default"]) for layer in layers] for leaf, name in LEAVES.items()}
    return {leaf: jnp.asarray(np.stack([np.squeeze(t.T) for t in tensors])) for leaf, tensors in leaves.items()}


def test_same_singular_values_zeroed_as_in_peft(theirs):
    procedure = AdaLoRABudget(target=2, warmup=2, cooldown=3, every=2, orthogonality=0.0)
    run, adapters = run_of(sx.AdaLoRA(rank=RANK))
    procedure.check(run, {})
    watch = procedure.watch(run)
    (node,) = nodes(adapters).values()

    def filled(leaves):
        return {"layers": {"proj": {"kernel": Adapter(leaves, {}, node.method)}}}

    opt = (watch.init(sx.split(adapters)[0]), optax.EmptyState())
    generator, counts = torch.Generator().manual_seed(1), []
    for step in range(1, STEPS + 1):
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        initial = stacked(theirs, lambda p: p.detach().numpy().copy())
        grads = filled(stacked(theirs, lambda p: p.grad.numpy().copy()))
        theirs.base_model.update_and_allocate(step)
        expected = stacked(theirs, lambda p: p.detach().numpy().copy())

        _, state = watch.update(grads, opt[0], filled(initial))
        assert procedure.due(step, run)
        boundary = procedure.apply(jax.random.key(0), step, run, Boundary(filled(initial), {}, (state, opt[1])))
        opt = boundary.opt
        ours = nodes(boundary.adapters)[PATH].train
        for leaf in LEAVES:
            np.testing.assert_array_equal(ours[leaf], expected[leaf], err_msg=f"{leaf} after step {step}")
        counts.append(int(np.count_nonzero(ours["e"])))
    assert counts[:2] == [12, 12] and counts[-4:] == [4, 4, 4, 4] and 4 < counts[3] < 12, counts


def test_budget_as_in_peft(theirs):
    allocator = theirs.base_model.rankallocator
    procedure = AdaLoRABudget(target=2, warmup=2, cooldown=3)
    for step in range(STEPS + 1):
        assert procedure.budget(step, STEPS, 12, 2) == allocator.budget_schedule(step)[0], step


def test_regulariser_as_in_peft(theirs):
    """Value and gradient, which `regularise` adds."""
    total = 0.0
    for name, p in theirs.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            total = total + torch.norm(gram - torch.eye(RANK)) / 4
    total.backward()
    _, adapters = run_of(sx.AdaLoRA(rank=RANK))
    (node,) = nodes(adapters).values()
    tree = {"layers": {"proj": {"kernel": Adapter(stacked(theirs, lambda p: p.detach().numpy()), {}, node.method)}}}
    np.testing.assert_allclose(orthogonality(tree), total.item(), rtol=1e-5)
    updates = AdaLoRABudget(orthogonality=0.5).regularise(jax.tree.map(jnp.zeros_like, tree), tree)
    expected = stacked(theirs, lambda p: np.zeros(p.shape, np.float32) if p.grad is None else p.grad.numpy())
    for leaf in LEAVES:
        np.testing.assert_allclose(nodes(updates)[PATH].train[leaf], 0.5 * expected[leaf], rtol=1e-4, atol=1e-6)


def test_padding_neither_counts_nor_competes():
    """A stack of ranks 3 and 6: padded e have the lowest scores there are, and are not among those given up."""
    run, adapters = run_of(sx.AdaLoRA(rank=(3, RANK)))
    (node,) = nodes(adapters).values()
    live = np.arange(RANK)[None] < np.array([3, RANK])[:, None]
    shapes = {"a": live[:, None, :], "b": live[:, :, None], "e": live}
    train = {name: jax.random.normal(jax.random.key(1), node.train[name].shape) * mask for name, mask in shapes.items()}
    tree = {"layers": {"proj": {"kernel": Adapter(train, {}, node.method)}}}
    procedure = AdaLoRABudget(target=2, orthogonality=0.0)
    watch = procedure.watch(run)
    _, state = watch.update(tree, watch.init(tree), tree)
    boundary = procedure.apply(jax.random.key(0), STEPS - 1, run, Boundary(tree, {}, state))
    assert np.count_nonzero(nodes(boundary.adapters)[PATH].train["e"]) == procedure.budget(STEPS - 1, STEPS, 9, 2) == 4
    square = jnp.eye(10, RANK)[None] * shapes["a"]
    orthonormal = Adapter({**train, "a": square, "b": square[:, :8].mT}, {}, node.method)
    assert float(orthogonality({"kernel": orthonormal})) < 1e-6


def test_mistakes_are_named():
    run, _ = run_of(sx.LoRA(rank=2))
    with pytest.raises(sx.SboraxError, match="use AdaLoRA for all"):
        AdaLoRABudget().check(run, {})
    run, _ = run_of(sx.AdaLoRA(rank=2))
    with pytest.raises(sx.SboraxError, match="leave none of the 12 steps"):
        AdaLoRABudget(target=1, warmup=6, cooldown=6).check(run, {})
