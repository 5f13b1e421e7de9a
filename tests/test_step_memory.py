"""Temporaries of the compiled step: adapters under a scan may not bring back a copy of what they adapt."""

import dataclasses

import jax
import pytest
from tiny_model import WIDE

import sborax as sx
from sborax.layout.state import flatten, parameters, put_together
from sborax.models.language_model import abstract
from sborax.plans.ahead import compiled, outline
from sborax.train.step import sums

pytestmark = pytest.mark.usefixtures("compiled_fully")

RULES = (
    # Several on one kernel, too.
    ("q_proj", sx.add(sx.LoRA(rank=2), sx.LoRA(rank=2), sx.SBoRA(rank=2))),
    ("k_proj", sx.DoRA(rank=2)),
    ("v_proj", sx.Bone(rank=4)),
    ("o_proj", sx.PiSSA(rank=2)),
    ("gate_proj", sx.SBoRA(rank=2, variant="FB")),
    ("up_proj", sx.LoRA(rank=2)),
    ("down_proj", sx.Bat(rank=4)),
)
LAYERS = (2, 18)


def outlines(quant, rules=RULES):
    """The same step of a few and of many layers, of so few tokens that weights outweigh activations."""
    experiment = sx.Experiment("x", sx.Data("x", max_length=8), rules, steps=10, batch_size=1, quant=quant)
    return [outline(experiment, dataclasses.replace(WIDE, num_hidden_layers=layers)) for layers in LAYERS]


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def growth(programs):
    small, large = (program.memory_analysis().temp_size_in_bytes for program in programs)
    return large - small


def surplus(small, large):
    """Bytes of the dense kernels, and of what is trained, that the larger model has more."""
    kernels = 4 * (parameters(abstract(large.model.config)) - parameters(abstract(small.model.config)))
    return kernels, size(large.state.train) - size(small.state.train)


@pytest.mark.nightly
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_temporaries_do_not_grow_with_the_base(quant):
    """Gradients grow with the layers, and what these keep of activations: a quarter of the kernels at most."""
    small, large = outlines(quant)
    kernels, trained = surplus(small, large)
    assert growth(map(compiled, (small, large))) < 2 * trained + kernels / 4


def test_temporaries_do_not_grow_with_a_basis_that_all_layers_share():
    """What layers keep of activations is a quarter of the copies of two (in, in) matrices at most."""
    copies = 2 * (LAYERS[1] - LAYERS[0]) * 4 * WIDE.hidden_size**2
    assert growth(map(compiled, outlines(None, [("q_proj", sx.FRoD(density=1e-3))]))) < copies / 4


@pytest.mark.nightly
def test_a_copy_of_the_base_would_be_seen():
    """The same loss by merging, which makes every adapted kernel at once."""

    def program(plan):
        def loss(train, frozen, base, batch):
            merged = sx.merge(put_together(base, {}), sx.combine(train["adapters"], frozen))
            part = jax.tree.map(lambda leaf: leaf[0], batch)
            return sums(plan.model, {"adapters": {}, "base": {}}, {}, flatten(merged), part, None).losses["loss"]

        return jax.jit(jax.grad(loss)).lower(plan.state.train, *plan.arguments[1:]).compile()

    small, large = outlines(None)
    kernels, trained = surplus(small, large)
    assert growth(map(program, (small, large))) > 2 * trained + kernels
