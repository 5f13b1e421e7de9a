"""MiLoRA against the paper's equations in float64, and its router's decision wherever a model carries it."""

import dataclasses
import json
import math
import runpy

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import sborax as sx
from sborax.adapters.core import Adapter, Context, SboraxError, structure
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.cli import main
from sborax.layout.state import start, take_apart
from sborax.methods.prompt_router import DENOMINATOR, NUMERATOR, PromptRouter, rational
from sborax.models import LanguageModel, Llama, LlamaConfig, abstract, generate
from sborax.models.llama import Block
from sborax.records.adapter import load_adapter, read_adapter, save_adapter
from sborax.train.loop import train
from sborax.train.optimizer import make_optimizer
from sborax.train.step import make_loss, make_step, prompt_mask
from tests.pages import ROOT
from tests.tiny_model import write_data, write_model

pytestmark = pytest.mark.usefixtures("strict")

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=(),
)
EXPERTS = 7
KEY = jax.random.key(0)
RULES = [("self_attn|mlp", sx.MiLoRA(rank=4, top_k=2))]
PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3])


def a_model(scan: bool = True) -> LanguageModel:
    """A random LLaMA whose layers matter: the usual 0.02 would leave every token as it came."""
    module = Llama(CONFIG, jnp.dtype("float32"), scan=scan)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    scaled = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 and leaf.std() > 0 else leaf, params)
    return LanguageModel(module, scaled, CONFIG, None)


def tuned(adapters, seed: int = 1, size: float = 0.2):
    """Every trained leaf moved at random."""
    train, frozen = sx.split(adapters)
    rng = np.random.default_rng(seed)
    return sx.combine(jax.tree.map(lambda leaf: leaf + noise(rng, leaf, size), train), frozen)


def noise(rng, leaf, size):
    return jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype)


@pytest.fixture(scope="module")
def model():
    return a_model()


@pytest.fixture(scope="module")
def parts(model, adapters):
    return take_apart(model.params, adapters)


@pytest.fixture(scope="module")
def losses_and_grads(model, parts):
    """Both losses of one microbatch, summed over its tokens that count, each with its gradient."""

    @jax.jit
    def of(train, batch):
        segments, counts = batch["segments"], batch["counts"]
        ctx = Context(prompt=prompt_mask(segments, counts))

        def totals(train):
            tree = sx.combine(train["adapters"], parts.frozen)
            hidden, figures = model.collect(
                model.params, tree, batch["tokens"], ["balance"], segment_ids=segments, ctx=ctx
            )
            balance = figures.balance
            chances = jax.nn.log_softmax(model.head(model.params, tree, hidden))
            log_probs = jnp.take_along_axis(chances, batch["targets"][:, :, None], axis=-1)[:, :, 0]
            return {
                "loss": -jnp.sum(jnp.where(counts, log_probs, 0.0)),
                "balance_loss": balance * jnp.sum(counts, dtype=jnp.float32),
            }

        names = ("loss", "balance_loss")
        return {name: jax.value_and_grad(lambda train, name=name: totals(train)[name])(train) for name in names}

    return of


@pytest.fixture(scope="module")
def adapters(model):
    with jax.numpy_dtype_promotion("strict"):
        return tuned(sx.attach(jax.random.key(1), model.params, RULES)[1])


@pytest.fixture(scope="module")
def run(model):
    """Logits and what the routers decided."""

    @jax.jit
    def call(params, adapters, tokens, prompt, segments, routing):
        variables = {"params": params, "adapters": adapters, "routing": routing}
        ctx = Context(prompt=prompt)
        return model.module.apply(variables, tokens, segments, None, ctx, mutable=["routing"])

    def of(adapters, tokens, prompt=None, segments=None, routing=None, params=model.params):
        tokens = jnp.asarray(tokens, jnp.int32)
        segments = jnp.ones_like(tokens) if segments is None else jnp.asarray(segments, jnp.int32)
        prompt = segments if prompt is None else jnp.asarray(prompt)
        logits, state = call(params, adapters, tokens, prompt.astype(bool), segments, routing or {})
        return logits, state.get("routing", {}).get("layers", {})

    return of


def padded(rows, side: str, width: int = 10):
    """Tokens and their mask."""
    tokens, mask = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        tokens[i, start : start + len(row)], mask[i, start : start + len(row)] = row, 1
    return tokens, mask


# The router, one sequence at a time in float64


def softmax(x):
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def reference(h, leaves, pooler, top_k, renormalise=False):
    """Chances and gates for one prompt `h`, (tokens, d), from the paper's equations."""
    w, numerator, denominator = (np.asarray(leaves[n], np.float64) for n in ("w", "numerator", "denominator"))
    h = np.asarray(h, np.float64)
    h = h / np.sqrt((h**2).mean(axis=1, keepdims=True) + 1e-6)
    if pooler == "attention":
        pooled = softmax(h @ np.asarray(leaves["pool"], np.float64)) @ h
    else:
        pooled = {"mean": h.mean(axis=0), "max": h.max(axis=0), "last": h[-1]}[pooler]
    above = sum(n * pooled**j for j, n in enumerate(numerator))
    below = 1 + np.abs(sum(d * pooled**i for i, d in enumerate(denominator, start=1)))
    chances = softmax((above / below) @ w)
    gates = np.zeros_like(chances)
    for expert in sorted(range(len(chances)), key=lambda i: -chances[i])[:top_k]:
        gates[expert] = chances[expert]
    return chances, gates / gates.sum() if renormalise else gates


def balance_of(chances):
    """N sum_i f_i p_i over the prompts of a batch."""
    total = 0.0
    for expert in range(len(chances[0])):
        f = np.mean([np.argmax(row) == expert for row in chances])
        total += f * np.mean([row[expert] for row in chances])
    return len(chances[0]) * total


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("pooler", ["attention", "mean", "max", "last"])
def test_the_router_is_the_papers(pooler, top_k):
    rng = np.random.default_rng(top_k)
    names = tuple(f"e{i}" for i in range(EXPERTS))
    for renormalise in (False, True):
        router = PromptRouter(names, top_k, pooler, renormalise, 0.25)
        fitted = router.init(jax.random.key(0), jnp.zeros((16, EXPERTS)), sx.Hint())
        assert ("pool" in fitted.train) == (pooler == "attention")
        leaves = {name: leaf + noise(rng, leaf, 0.3) for name, leaf in fitted.train.items()}
        x = (rng.standard_normal((4, 6, 16)) * 10).astype(np.float32)
        # Padding on the left, on both sides, a row of no prompt at all, a whole row.
        mask = np.array([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0] * 6, [1] * 6], bool)
        gates, loss = router.route(jnp.asarray(x), jnp.asarray(mask), Adapter(leaves, fitted.frozen, router))
        rows = [i for i in range(4) if mask[i].any()]
        want = [reference(x[i][mask[i]], leaves, pooler, top_k, renormalise) for i in rows]
        np.testing.assert_allclose(gates[np.array(rows)], [gate for _, gate in want], atol=2e-6)
        np.testing.assert_allclose(loss, 0.25 * balance_of([chances for chances, _ in want]), rtol=1e-5)
        assert np.isfinite(gates).all() and ((np.asarray(gates) > 0).sum(axis=1) == top_k).all()
        if renormalise:
            np.testing.assert_allclose(np.sum(gates, axis=1), 1.0, rtol=1e-6)


def test_the_activation_starts_as_gelu():
    x = np.linspace(-3, 3, 2001)
    router = PromptRouter(("a", "b"), 1, "mean", False, 0.0)
    leaves = router.init(jax.random.key(0), jnp.zeros((4, 2)), sx.Hint()).train
    assert leaves["numerator"].shape == (len(NUMERATOR),) and leaves["denominator"].shape == (len(DENOMINATOR),)
    ours = rational(jnp.asarray(x[None], jnp.float32), Adapter(leaves, {}, router))[0]
    gelu = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x])
    assert 0 < np.abs(ours - gelu).max() < 1.3e-4


def test_rows_without_a_prompt_have_a_gradient_without_nan():
    routers = [PromptRouter(("a", "b", "c"), 2, pooler, True, 1.0) for pooler in ("attention", "mean", "max", "last")]
    fitted = [router.init(jax.random.key(0), jnp.zeros((8, 3)), sx.Hint()) for router in routers]
    mask = jnp.zeros((2, 5), bool).at[1].set(True)

    @jax.jit
    @jax.grad
    def slopes(trained):
        total = jnp.float32(0)
        for router, leaves, (_, frozen, _) in zip(routers, trained["leaves"], fitted, strict=True):
            gates, balance = router.route(trained["x"], mask, Adapter(leaves, frozen, router))
            total = total + gates[1, 0] + balance
        return total

    x = jnp.ones((2, 5, 8)).at[0].set(0.0)
    chex.assert_tree_all_finite(slopes({"leaves": [leaves for leaves, _, _ in fitted], "x": x}))


# What a model does with the decision


def test_attach_puts_one_router_into_every_layer(model):
    _, adapters = sx.attach(jax.random.key(1), model.params, RULES)
    router = adapters["layers"]["router"]
    assert len(router.method.experts) == EXPERTS == len(nodes(adapters)) - 1
    chex.assert_shape(router.train["w"], (2, 64, EXPERTS))
    assert not np.array_equal(router.train["w"][0], router.train["w"][1])
    frozen = sx.split(adapters)[1]["layers"]["router"]
    assert list(frozen.frozen) == ["balance"] and frozen.train == {}
    np.testing.assert_array_equal(router.frozen["balance"], np.float32([1e-2, 1e-2]))
    model.check_adapters(adapters)
    with pytest.raises(SboraxError, match="no such projection"):
        model.check_adapters({"router": router})


@pytest.mark.nightly
def test_each_layer_routes_by_its_own_input(adapters):
    """The unrolled model shows what goes into each block."""
    model = a_model(scan=False)
    stacked = a_model()
    tree = unstacked(adapters)
    tokens, mask = padded(PROMPTS, "left")

    @jax.jit
    def call(variables, tokens, mask):
        ctx = Context(prompt=mask)
        is_block, names = (lambda module, _: isinstance(module, Block)), ["routing", "intermediates"]
        return model.module.apply(variables, tokens, mask, None, ctx, capture_intermediates=is_block, mutable=names)

    variables = {"params": unstacked(stacked.params), "adapters": tree}
    _, state = call(variables, jnp.asarray(tokens), jnp.asarray(mask))
    embedding = stacked.params["embed_tokens"]["embedding"]
    inputs = [embedding[tokens], state["intermediates"]["layers"]["0"]["__call__"][0][0]]
    for layer, x in enumerate(inputs):
        leaves = tree["layers"][str(layer)]["router"].train
        want = [reference(row[keep > 0], leaves, "attention", 2) for row, keep in zip(x, mask, strict=True)]
        got = state["routing"]["layers"][str(layer)]
        np.testing.assert_allclose(got["gates"], [gates for _, gates in want], atol=1e-5)
        np.testing.assert_allclose(got["loss"], 1e-2 * balance_of([chances for chances, _ in want]), rtol=1e-4)
    assert not np.allclose(*(state["routing"]["layers"][i]["gates"] for i in "01"))


def unstacked(tree):
    """Params or adapters of a stacked model as those of an unrolled one."""
    layers = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(2)}
    return {**tree, "layers": layers}


def without_router(adapters):
    return nest({path: node for path, node in nodes(adapters).items() if not path.endswith("router")})


def as_lora(adapters, keep=lambda path: True):
    """The same factors as plain LoRA, those that are not kept being zero."""
    method = structure(sx.LoRA(rank=4))

    def convert(path, node):
        b = node.train["b"] if keep(path) else jnp.zeros_like(node.train["b"])
        return Adapter({"a": node.train["a"], "b": b}, node.frozen, method)

    return nest({path: convert(path, node) for path, node in nodes(without_router(adapters)).items()})


def decided(gates):
    """A decision for the same sequences in both layers."""
    return {"layers": {"gates": jnp.broadcast_to(jnp.asarray(gates, jnp.float32), (2, *np.shape(gates)))}}


def test_unit_gates_are_plain_lora(run, adapters):
    tokens, mask = padded(PROMPTS, "right")
    lora, _ = run(as_lora(adapters), tokens, segments=mask)
    ones, _ = run(adapters, tokens, segments=mask, routing=decided(np.ones((3, EXPERTS))))
    chex.assert_trees_all_close(ones, lora, atol=1e-5)
    chex.assert_trees_all_close(run(without_router(adapters), tokens, segments=mask)[0], lora, atol=1e-5)
    assert not np.allclose(run(adapters, tokens, segments=mask)[0], lora, atol=1e-2)


def test_every_gate_opens_its_own_expert_for_its_own_sequence(run, adapters):
    names = adapters["layers"]["router"].method.experts
    tokens, mask = padded(PROMPTS, "right")
    for expert, name in enumerate(names):
        gates = np.zeros((3, EXPERTS))
        gates[1, expert] = 1.0
        got, _ = run(adapters, tokens, segments=mask, routing=decided(gates))
        alone, _ = run(as_lora(adapters, lambda path, name=name: name in path), tokens, segments=mask)
        base, _ = run({}, tokens, segments=mask)
        chex.assert_trees_all_close(got, alone.at[jnp.array([0, 2])].set(base[jnp.array([0, 2])]), atol=1e-5)
        assert not np.allclose(alone[1], base[1], atol=1e-3), name


def test_padding_does_not_matter(run, adapters):
    singly = [run(adapters, [prompt]) for prompt in PROMPTS]
    for side in ("left", "right"):
        tokens, mask = padded(PROMPTS, side)
        logits, routing = run(adapters, tokens, segments=mask)
        for row, (output, alone) in enumerate(singly):
            np.testing.assert_allclose(routing["gates"][:, row], alone["gates"][:, 0], atol=1e-5)
            np.testing.assert_allclose(logits[row][mask[row] > 0], output[0], atol=1e-4)


def test_the_answer_is_not_read(run, adapters):
    rng = np.random.default_rng(0)
    tokens, replacement = rng.integers(0, 40, (2, 2, 12))
    read = np.broadcast_to(np.arange(12) < 5, (2, 12))
    prompt = read.astype(np.int32)
    gates = run(adapters, tokens, prompt)[1]["gates"]
    changed = run(adapters, np.where(read, tokens, replacement), prompt)[1]["gates"]
    chex.assert_trees_all_equal(gates, changed)
    assert not np.allclose(gates, run(adapters, np.where(read, replacement, tokens), prompt)[1]["gates"])


@pytest.mark.nightly
def test_decoding_keeps_the_decision_of_the_prompt(model, run, adapters):
    new = 6
    for padding in ("left", "right"):
        outputs = generate(model, model.params, adapters, PROMPTS, new, padding=padding)
        for prompt, tokens in zip(PROMPTS, outputs, strict=True):
            text = [*prompt, *tokens]
            logits, _ = run(adapters, [text], [[1] * len(prompt) + [0] * new])
            assert np.argmax(logits[0, len(prompt) - 1 : -1], axis=-1).tolist() == tokens


@pytest.mark.nightly
def test_one_decoded_token_equals_the_full_forward(model, run, adapters):
    module = model.module.clone(keep=True)
    variables = {"params": model.params, "adapters": adapters}
    tokens, mask = padded(PROMPTS, "left")
    ctx = Context(prompt=jnp.asarray(mask))
    (_, cache), routing = module.apply(
        variables, jnp.asarray(tokens), jnp.asarray(mask), None, ctx, mutable=["routing"], method="hidden"
    )
    following = jnp.asarray([[7], [11], [13]], jnp.int32)
    step = {
        "positions": jnp.asarray(mask.sum(axis=1, keepdims=True)),
        "past": (cache, jnp.asarray(mask)),
        "method": "hidden",
    }
    hidden, _ = module.apply({**variables, **routing}, following, **step)
    logits = module.apply(variables, hidden, method="head")
    ones = np.ones((3, 1), np.int32)
    sequence = np.concatenate([tokens, following], axis=1)
    want, _ = run(adapters, sequence, np.concatenate([mask, 0 * ones], axis=1), np.concatenate([mask, ones], axis=1))
    np.testing.assert_allclose(logits[:, 0], want[:, -1], atol=1e-4)
    rerouted, _ = run(adapters, sequence, None, np.concatenate([mask, ones], axis=1))
    assert not np.allclose(rerouted[:, -1], want[:, -1], atol=1e-3), "the last token changes nothing: no proof"
    with pytest.raises(SboraxError, match="decides by the prompt"):
        module.apply(variables, following, **step)


# Planning, counting, composing


def test_counts_are_the_published_ones():
    """LLaMA-2-7B at rank 32: 79.95M in experts and 0.92M in routers, 80.87M, the paper's 80.9M."""
    big = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    params = abstract(big)
    experts = 32 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    routers = 32 * (7 * 4096 + 12)
    for pooler, pool_size in (("mean", 0), ("attention", 32 * 4096)):
        rules = [("self_attn|mlp", sx.MiLoRA(pooler=pooler))]
        adapters = jax.eval_shape(lambda params, r=rules: sx.attach(jax.random.key(0), params, r)[1], params)
        assert sx.count(without_router(adapters)) == experts == 79_953_920
        assert sx.count(adapters) == experts + routers + pool_size
    assert round(experts / 1e6, 2) == 79.95 and round(routers / 1e6, 2) == 0.92
    assert round((experts + routers) / 1e6, 2) == 80.87


def test_a_router_is_drawn_alike_in_a_stack_and_in_its_layers(model):
    _, adapters = sx.attach(jax.random.key(1), model.params, RULES)
    _, single = sx.attach(jax.random.key(1), unstacked(model.params), RULES)
    chex.assert_trees_all_close(single, unstacked(adapters), atol=1e-6)


def test_layers_are_chosen_where_they_are_not_stacked(model):
    rules = [sx.Rule("mlp", sx.MiLoRA(rank=2), layers=(1,)), sx.Rule("q_proj", sx.MiLoRA(rank=2))]
    sites = sx.plan(unstacked(model.params), rules).sites
    assert [(site.path, site.shape, site.layer) for site in sites if site.shape[1] < 10] == [
        ("layers/1/router", (64, 4), 1)
    ]


def test_an_expert_alone_has_no_router(model):
    _, adapters = sx.attach(jax.random.key(1), model.params, [("q_proj|lm_head", sx.MiLoRA(rank=4))])
    assert set(nodes(adapters)) == {"layers/self_attn/q_proj/kernel", "lm_head/kernel"}


def test_ranks_may_differ_and_other_methods_may_stand_beside(model, run):
    rules = [
        ("mlp", sx.MiLoRA(rank=sx.LinearRanks(2, 6))),
        ("q_proj", sx.add(sx.MiLoRA(rank=3), sx.LoRA(rank=2))),
        ("v_proj", sx.scale(sx.MiLoRA(rank=3), 0.5)),
        ("o_proj", sx.DoRA(rank=2)),
    ]
    adapters = tuned(sx.attach(jax.random.key(1), model.params, rules)[1])
    router = adapters["layers"]["router"].method
    assert len(router.experts) == 5 and "self_attn/o_proj" not in router.experts
    gates = run(adapters, [PROMPTS[0]])[1]["gates"]
    assert ((np.asarray(gates) > 0).sum(axis=-1) == 1).all()


def test_trees_are_scaled_and_added(model, run, adapters):
    base, _ = run({}, [PROMPTS[0]])
    off, routing = run(sx.scale(adapters, 0.0), [PROMPTS[0]])
    chex.assert_trees_all_close(off, base, atol=1e-5)
    assert "gates" in routing
    lora = tuned(sx.attach(jax.random.key(3), model.params, [("q_proj", sx.LoRA(rank=2))])[1])
    total, routing = run(sx.add(adapters, lora), [PROMPTS[0]])
    assert "gates" in routing and not np.allclose(total, run(adapters, [PROMPTS[0]])[0], atol=1e-3)
    with pytest.raises(SboraxError, match="layers/router: each tree has its own, and"):
        sx.add(adapters, adapters)


def test_specs_leave_routers_whole(model, adapters):
    specs = sx.specs(adapters, jax.tree.map(lambda leaf: P(*[None] * (leaf.ndim - 1), "x"), model.params))
    assert specs["layers"]["router"].train["w"] == P(None, None, None)
    assert specs["layers"]["mlp"]["up_proj"]["kernel"].train["b"] == P(None, None, "x")
    chex.assert_trees_all_equal_structs(jax.tree.map(lambda _: 0, adapters), jax.tree.map(lambda _: 0, specs))


REFUSED = {
    "options": ([("mlp", sx.MiLoRA(top_k=1)), ("self_attn", sx.MiLoRA(top_k=2))], "its experts disagree"),
    "layers": ([sx.Rule("mlp", sx.MiLoRA(rank=2), layers=(0,))], "drop `layers=`"),
    "top_k": ([("mlp", sx.MiLoRA(top_k=4))], r"layers/router \(64, 3\): top_k must lie in 1..3"),
    "none": ([("up_proj", sx.MiLoRA(top_k=0))], "top_k must lie in 1..1"),
    "balance": ([("mlp", sx.MiLoRA(balance=-1.0))], "balance must be 0 or more"),
    "router": ([("mlp", PromptRouter(("a", "b"), 1, "mean", False, 0.0))], "is placed by the method"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_planned(model, name):
    rules, message = REFUSED[name]
    with pytest.raises(SboraxError, match=message) as caught:
        sx.plan(model.params, rules)
    assert "\n" not in str(caught.value)


def test_no_weight_equals_it(model, adapters, tmp_path):
    for refused in (lambda: sx.merge(model.params, adapters), lambda: sx.chain(sx.MiLoRA(rank=2), sx.DoRA(rank=2))):
        with pytest.raises(SboraxError, match="a router weighs it anew for every prompt"):
            refused()
    for form, reason in (("native", "PEFT has no MiLoRA"), ("lora", "MiLoRA is no plain LoRA")):
        with pytest.raises(SboraxError, match=f"{reason}.*a router weighs it anew"):
            sx.save_peft(tmp_path / form, model, model.params, adapters, as_=form)
    kernel = jnp.zeros((64, EXPERTS))
    router = jax.tree.map(lambda leaf: leaf[0], adapters["layers"]["router"])
    with pytest.raises(SboraxError, match="PromptRouter projects nothing"):
        sx.linear(jnp.zeros((1, 64)), kernel, router)


# Training


def a_batch(accumulate: int = 1):
    rng = np.random.default_rng(0)
    shape = (accumulate, 4, 12)
    place = np.arange(12)
    prompt_end, end = rng.integers(3, 6, (*shape[:2], 1)), rng.integers(8, 12, (*shape[:2], 1))
    batch = {
        "tokens": rng.integers(0, 40, shape).astype(np.int32),
        "targets": rng.integers(0, 40, shape).astype(np.int32),
        "counts": (place >= prompt_end) & (place < end),
        "segments": np.broadcast_to(place < end, shape).astype(np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def test_the_prompt_ends_where_the_first_answer_begins():
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])
    counts = jnp.asarray([[0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1], [0] * 7], bool)
    want = [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(prompt_mask(segments, counts), np.array(want, bool))


@pytest.mark.nightly
def test_gradients_reach_every_leaf_and_balance_is_part_of_the_loss(model, run, adapters, parts, losses_and_grads):
    batch = jax.tree.map(lambda leaf: leaf[0], a_batch())
    results = losses_and_grads(parts.train, batch)
    for path, leaf in jax.tree_util.tree_leaves_with_path(results["loss"][1]["adapters"]["layers"]["router"]):
        assert (np.abs(leaf).reshape(2, -1).max(axis=1) > 0).all(), jax.tree_util.keystr(path)
    counted = int(batch["counts"].sum())
    prompt = prompt_mask(batch["segments"], batch["counts"])
    _, routing = run(adapters, batch["tokens"], prompt, batch["segments"])
    np.testing.assert_allclose(results["balance_loss"][0], counted * np.mean(routing["loss"]), rtol=1e-5)

    tx = make_optimizer(sx.Optimizer(name="sgd", betas=(0.0, 0.9), schedule="constant", warmup=0, lr=1.0, clip=None), 1)
    initial = start(parts, tx)
    leaves = jax.device_get(initial.train)
    batches = jax.tree.map(lambda leaf: leaf[None], batch)
    state, numbers = make_step(model, tx, jax.random.key(0))(initial, parts.frozen, parts.base, batches)
    gradient = jax.tree.map(lambda first, second: (first + second) / counted, *(results[name][1] for name in results))
    step = jax.tree.map(lambda old, new: old - np.asarray(new), leaves, state.train)
    chex.assert_trees_all_close(step, gradient, atol=2e-6)
    for name, (total, _) in results.items():
        np.testing.assert_allclose(numbers[name], total / counted, rtol=1e-5)
    held_out, tokens = make_loss(model)(parts.train, parts.frozen, parts.base, batch)
    np.testing.assert_allclose(float(held_out) / int(tokens), numbers["loss"], rtol=1e-5)


@pytest.mark.nightly
def test_microbatches_weigh_balance_by_their_tokens(model, parts, losses_and_grads):
    tx = make_optimizer(sx.Optimizer(), 1)
    batches = a_batch(2)
    _, numbers = make_step(model, tx, jax.random.key(0))(start(parts, tx), parts.frozen, parts.base, batches)
    singles = [losses_and_grads(parts.train, jax.tree.map(lambda leaf, i=i: leaf[i], batches)) for i in range(2)]
    for name in ("loss", "balance_loss"):
        total = sum(float(single[name][0]) for single in singles)
        np.testing.assert_allclose(numbers[name], total / int(batches["counts"].sum()), rtol=1e-5)


def test_an_adapter_file_brings_the_router_back(model, adapters, tmp_path):
    save_adapter(tmp_path, adapters, rules=RULES)
    params, back = load_adapter(tmp_path, model.params)
    chex.assert_trees_all_equal(back, adapters)
    chex.assert_trees_all_equal_structs(back, adapters)
    chex.assert_trees_all_equal(params, model.params)


def an_experiment(place, **changes):
    data = sx.Data(str(place / "data.jsonl"), template="{instruction}", answer=" {output}", max_length=32)
    fields = {"model": str(place / "model"), "data": data, "rules": [("self_attn|mlp", sx.MiLoRA(rank=4))]}
    return sx.Experiment(**fields | {"steps": 6, "optimizer": sx.Optimizer(lr=1e-2), "eval": sx.Eval(data)} | changes)


@pytest.mark.nightly
def test_a_run_from_plan_to_text(tmp_path, capsys):
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    out = tmp_path / "run"
    with jax.numpy_dtype_promotion("standard"):
        summary = train(an_experiment(tmp_path), out, echo=lambda _: None)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
        assert all(0 < line["balance_loss"] < 0.07 for line in steps), "lambda N at most"
        capsys.readouterr()
        assert main(["plan", str(out)]) == 0
        output = capsys.readouterr().out
        assert "layers/router" in output and f"trainable: {summary.trainable_parameters:,} parameters" in output
        assert main(["generate", str(out), "--prompt", "3 plus 3?", "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out.startswith("3 plus 3?")
        for command in ("merge", "export"):
            assert main([command, str(out), str(tmp_path / command)]) == 2
            assert "a router weighs it anew for every prompt" in capsys.readouterr().err
        assert main(["methods", "milora"]) == 0
        assert "arXiv:2410.18035" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"packing": True}, "data: .*set packing=False"),
        ({"loss_on": "all"}, "data: .*set loss_on='answer'"),
        ({"template": "text"}, "data: .*has no prompt"),
        ({"overlong": "split"}, "data: .*use 'drop' or 'truncate'"),
    ],
)
def test_data_without_a_prompt_in_every_row_are_refused(tmp_path, changes, says):
    good = an_experiment(tmp_path)
    bad = dataclasses.replace(good.data, **changes)
    with pytest.raises(SboraxError, match=says):
        dataclasses.replace(good, data=bad)
    with pytest.raises(SboraxError, match="eval.data: a method that routes"):
        dataclasses.replace(good, eval=sx.Eval(bad))
    assert dataclasses.replace(good, data=bad, rules=[("mlp", sx.LoRA(rank=2))], eval=sx.Eval()).data == bad


@pytest.mark.nightly
def test_the_activation_learns_from_held_out_batches_in_turn(tmp_path):
    """`examples/milora_bilevel.py`: each half moves by its own gradient alone, on its own data."""
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.jsonl")
    example = runpy.run_path(str(ROOT / "examples" / "milora_bilevel.py"))
    held_out = sx.Data(
        [{"instruction": "is ice cold?", "output": "yes"}] * 4,
        template="{instruction}",
        answer=" {output}",
        max_length=32,
    )
    optimizer = sx.AdamW(lr=1e-2, schedule="constant", warmup=0, clip=None)
    experiment = an_experiment(tmp_path, steps=2, optimizer=optimizer, eval=sx.Eval(held_out))
    losses = example["train"](experiment, tmp_path, theta_lr=1e-3)
    assert len(losses) == 2 and losses[1][0] != losses[0][0]
    adapters = nodes(read_adapter(tmp_path / "adapter").adapters)

    # By hand: two Adams, each on its leaves of a gradient of the whole.
    model = sx.read_model(experiment)
    batches, _ = sx.read_data(experiment, model, lambda _: None)
    (validation,) = sx.read_held_out(experiment, model, lambda _: None)
    prepared = sx.prepare(experiment, model, 2)
    parts = prepared.adapt(model.params)
    train, validation = parts.train, jax.tree.map(lambda array: array[None], validation)
    txs = {"omega": optax.adam(1e-2), "theta": optax.adam(1e-3)}
    states = {half: tx.init(train) for half, tx in txs.items()}
    gradient = jax.jit(lambda train, batch: sx.forward_backward(model, train, parts.frozen, parts.base, batch, KEY)[1])
    for number in range(2):
        for half, batch in (("omega", batches[number]), ("theta", validation)):
            grads = gradient(train, batch)
            with jax.numpy_dtype_promotion("standard"):
                updates, states[half] = txs[half].update(grads, states[half], train)
                new_leaves = optax.apply_updates(train, updates)
            halves = example["halves"](train)
            train = jax.tree.map(lambda of, old, new, half=half: new if of == half else old, halves, train, new_leaves)
    want = nodes(sx.combine(train["adapters"], parts.frozen))
    assert set(want) == set(adapters)
    chex.assert_trees_all_close(
        {path: adapters[path].train for path in want}, {k: v.train for k, v in want.items()}, atol=2e-4
    )
    router = next(path for path in want if path.endswith("router"))
    for name, first in (("numerator", NUMERATOR), ("denominator", DENOMINATOR)):
        change = np.abs(np.asarray(adapters[router].train[name]) - np.asarray(first, np.float32))
        # Two steps of 1e-3 of Adam, not of 1e-2.
        assert 5e-4 < change.max() < 2.5e-3
