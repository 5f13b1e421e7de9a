"""The contract inside a model: every method takes a step in a tiny LLaMA, dense or of experts, whatever its form.

Rows come from `cases.py` and act on kernels of (IN, OUT). The first rows that vary in what a model has to do for them
always run; the others run with `-m nightly`.
"""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IN, INVOCATION, LAYERS, METHODS, OUT, Case, hint_for
from torch_pair import shaken

import sborax as sx
from sborax.adapters.core import AbstractFactored, dense, is_weight
from sborax.adapters.grouped import AbstractGrouped
from sborax.adapters.leaves import flatten, nest
from sborax.adapters.paths import kernels, stack_axes
from sborax.adapters.routing import routed_parts
from sborax.layout.state import take_apart
from sborax.models import LanguageModel, Llama, LlamaConfig, generate
from sborax.models.config import Experts
from sborax.models.nf4 import quantise

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=IN,
    intermediate_size=OUT,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=(),
)
EXPERTS = dataclasses.replace(CONFIG, model_type="mixtral", experts=Experts(count=3, chosen=2, intermediate_size=OUT))
TARGETS = "mlp/(experts/)?(gate|up)_proj"
TOKENS = (
    jax.random.randint(jax.random.key(0), (1, 4, 9), 1, CONFIG.vocab_size, jnp.int32).at[:, :, 2].set(INVOCATION[0])
)
BATCH = {
    "tokens": TOKENS[:, :, :-1],
    "targets": TOKENS[:, :, 1:],
    "counts": jnp.broadcast_to(jnp.arange(8) >= 3, (1, 4, 8)),
    "segments": jnp.ones((1, 4, 8), jnp.int32),
}


def demands(case: Case) -> tuple[bool, ...]:
    """What a model meets: values of other layers, decisions on the prompt, layers of other ranks, kernels that move."""
    method = case.method
    return bool(method.linked), bool(routed_parts(method)), bool(method.ragged), bool(method.materialises)


def grouped_form(method) -> str:
    """How an adapter of a stack of experts is applied to rows of theirs."""
    if isinstance(method, AbstractGrouped):
        return "own"
    return "tiles" if method.no_merge else "thin" if isinstance(method, AbstractFactored) else "merged"


def rows(cases, subset):
    """Parameters with ids, those outside `subset` nightly."""
    marks = {case.name: () if case in subset else (pytest.mark.nightly,) for case in cases}
    return [pytest.param(case, id=case.name, marks=marks[case.name]) for case in cases]


FEW = {demands(case): case for case in reversed(METHODS)}.values()
"""The first row of each kind."""
# Methods that link layers, or take means over tokens, do not act on experts.
ON_EXPERTS = [case for case in METHODS if not (case.method.linked or case.method.token_mean)]
FEW_ON_EXPERTS = {grouped_form(case.method): case for case in reversed(ON_EXPERTS)}


def by(few_on_experts):
    """Every row in both models: dense, and with experts."""
    dense_rows = (pytest.param(*row.values, CONFIG, id=row.id, marks=row.marks) for row in rows(METHODS, FEW))
    return pytest.mark.parametrize(
        ("case", "config"),
        [
            *dense_rows,
            *(pytest.param(*row.values, EXPERTS, id=f"{row.id}-experts", marks=row.marks)
              for row in rows(ON_EXPERTS, few_on_experts)),
        ],
    )  # fmt: skip


by_case = by([])
"""A step with experts takes long to compile: most of them are compiled nightly."""


@pytest.fixture
def model_of(config):
    """A function of the module's options."""

    def make(**options) -> LanguageModel:
        return LanguageModel(Llama(config, jnp.dtype("float32"), **options), {}, config, None)

    return make


@functools.cache
def params_of(config):
    return jax.jit(Llama(config, jnp.dtype("float32")).init)(jax.random.key(1), TOKENS[0])["params"]


@pytest.fixture
def adapted(case, config):
    """The base and adapters that have moved from their start."""
    params = params_of(config)
    grads = {
        path.removesuffix("/kernel"): hint_for(
            case.method, jax.random.normal(jax.random.key(2), leaf.shape), stack_axes(path, leaf.ndim)
        )
        for path, leaf in kernels(params).items()
    }
    base, adapters = sx.attach(jax.random.key(3), params, [(TARGETS, case.method)], hints=grads)
    return base, shaken(adapters)


def step(model, base, adapters, batch=BATCH):
    """Losses, and the gradient of the adapters."""
    parts = take_apart(base, adapters)
    call = jax.jit(
        lambda train, frozen, flat: sx.forward_backward(model, train, frozen, flat, batch, jax.random.key(4))
    )
    sums, grads = call(parts.train, parts.frozen, parts.base)
    return jax.tree.map(lambda total: total / sums.items, sums.losses), grads["adapters"]


def layers_of(tree):
    """A stack of layers as numbered ones."""
    remainder = {name: leaf for name, leaf in tree.items() if name != "layers"}
    apart = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(LAYERS)}
    return remainder | {"layers": apart}


@by_case
def test_a_step_is_the_same_unrolled_recomputed_and_in_parts(case, model_of, adapted):
    base, adapters = adapted
    losses, grads = step(model_of(), base, adapters)
    assert all(np.abs(np.asarray(leaf)).max() > 0 for leaf in jax.tree.leaves(grads))
    variants = {
        "recomputed": step(model_of(remat="full"), base, adapters),
        "recomputed but for thin values": step(model_of(remat="adapter_h"), base, adapters),
    }
    if not case.method.draws:
        # A key belongs to a layer's place in the module, and to a microbatch.
        variants["unrolled"] = step(model_of(scan=False), layers_of(base), layers_of(adapters))
    inexact = case.method.draws or case.method.batch_gradient or case.method.token_mean
    if not routed_parts(case.method) and not inexact:
        # What routers add is a mean over microbatches, and other means are over each.
        halves = {name: array.reshape(2, 2, 8) for name, array in BATCH.items()}
        variants["in parts"] = step(model_of(), base, adapters, halves)
    for name, (values, slopes) in variants.items():
        expected = layers_of(grads) if name == "unrolled" else grads
        chex.assert_trees_all_close(values, losses, rtol=1e-5, atol=1e-6, custom_message=name)
        chex.assert_trees_all_close(slopes, expected, rtol=1e-4, atol=1e-5, custom_message=name)


@by([FEW_ON_EXPERTS["thin"]])
def test_a_step_on_four_bits_is_one_on_what_they_mean(case, model_of, adapted):
    flat = flatten(adapted[0])
    packed = nest(
        {path: quantise(leaf) if re.search(f"{TARGETS}/kernel", path) else leaf
         for path, leaf in flat.items()}
    )  # fmt: skip
    plain = jax.tree.map(lambda leaf: dense(leaf) if is_weight(leaf) else leaf, packed, is_leaf=is_weight)
    adapters = sx.rebase(plain, adapted[1])
    losses, grads = step(model_of(), packed, sx.rebase(packed, adapted[1]))
    expected, slopes = step(model_of(), plain, adapters)
    chex.assert_trees_all_close(losses, expected, rtol=1e-5)
    chex.assert_trees_all_close(grads, slopes, rtol=1e-3, atol=1e-5)


@by([FEW_ON_EXPERTS["tiles"]])
def test_adapters_side_by_side_are_each_alone(case, model_of, adapted):
    base, adapters = adapted
    train, frozen = sx.split(adapters)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), train)
    model = model_of()
    ctx = sx.Context(prompt=BATCH["counts"][0] == 0)

    def hidden(train):
        return model.hidden(base, sx.combine(train, frozen), BATCH["tokens"][0], ctx=ctx)

    outputs = jax.jit(jax.vmap(hidden))(stack)
    for number in range(2):
        alone = jax.jit(hidden)(jax.tree.map(lambda leaf, number=number: leaf[number], stack))
        np.testing.assert_allclose(outputs[number], alone, rtol=1e-4, atol=1e-5)


@by_case
def test_text_with_a_cache_is_text_without(case, model_of, adapted):
    base, adapters = adapted
    model = dataclasses.replace(model_of(), params=base)
    prompt = [int(token) for token in TOKENS[0, 0, :5]]
    (output,) = generate(model, base, adapters, [prompt], 4)
    text = list(prompt)
    mask = jnp.arange(9) < len(prompt)
    for _ in range(4):
        padded = jnp.asarray([text + [0] * (9 - len(text))], jnp.int32)
        segments = jnp.asarray([[1] * len(text) + [0] * (9 - len(text))], jnp.int32)
        ctx = sx.Context(prompt=mask[None])
        logits = model.apply(base, adapters, padded, segment_ids=segments, ctx=ctx)
        text.append(int(logits[0, len(text) - 1].argmax()))
    assert list(output)[-4:] == text[-4:]
