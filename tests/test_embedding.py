"""Adapters of the embedding, and of a head that is tied to it or not: look-ups, merged tables, training and PEFT."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
import transformers
from cases import METHODS
from nightly import nightly_unless
from safetensors.numpy import load_file, save_file
from tiny_model import WIDE, write_data, write_model
from torch_pair import TOKENS, build, logits, reloaded, shaken, torch_logits, with_peft

import sborax as sx
from sborax.adapters.core import OUTPUT_DROPOUTS
from sborax.adapters.leaves import nest
from sborax.adapters.tables import why_no_table
from sborax.adapters.tree import nodes
from sborax.cli.main import main
from sborax.interop.peft import load_peft, save_peft
from sborax.models import LanguageModel, Llama, generate, load_model
from sborax.models.nf4 import NF4Array
from sborax.optim.lora_fa import split_lora_fa
from sborax.optim.lora_plus import lora_plus
from sborax.records.adapter import fingerprint, load_adapter, save_adapter
from sborax.sweep.grid import Sweep
from sborax.sweep.run import sweep
from sborax.train.base import quantise_base
from sborax.train.loop import train
from sborax.train.outputs import Outputs

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",
    "ignore:Model with `tie_word_embeddings=True`:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
)
CLOSE = {"rtol": 0, "atol": 1e-4}
TABLE, LOOKUP, HEAD = "embed_tokens/embedding", "embed_tokens/lookup", "lm_head/kernel"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return build(tmp_path_factory.mktemp("untied"))


FILES = {
    "untied, both": ("untied", ["embed_tokens", "lm_head", "q_proj"], False, {TABLE, HEAD}),
    "untied, embedding": ("untied", ["embed_tokens"], False, {TABLE}),
    "tied, both apart": ("tied", ["embed_tokens", "lm_head"], False, {LOOKUP, HEAD}),
    "tied, look-ups": ("tied", ["embed_tokens", "q_proj"], False, {LOOKUP}),
    "tied, head": ("tied", ["lm_head"], False, {HEAD}),
    "tied, shared": ("tied", ["embed_tokens", "q_proj"], True, {TABLE}),
    "tied, shared by the head's name": ("tied", ["lm_head"], True, {TABLE}),
    "tied, shared by a pattern": ("tied", r".*embed_tokens|lm_head|.*q_proj", True, {TABLE}),
}
FEW = ("untied, both", "tied, both apart", "tied, shared")


@pytest.mark.parametrize("name", nightly_unless(FEW, FILES))
def test_files_of_peft(name, request, tmp_path):
    """PEFT's adapter computes the same here, and again in PEFT when written by us."""
    model, targets, ties, paths = FILES[name]
    pair = request.getfixturevalue(model)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, ensure_weight_tying=ties)
    theirs = with_peft(pair, config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = torch_logits(theirs)
    assert np.abs(expected - torch_logits(pair.torch)).max() > 0.05
    params, adapters = load_peft(tmp_path / "theirs", pair.ours)
    assert {path for path in nodes(adapters) if not path.startswith("layers/")} == paths
    np.testing.assert_allclose(logits(pair.ours, params, adapters), expected, **CLOSE)
    save_peft(tmp_path / "ours", pair.ours, params, adapters)
    np.testing.assert_allclose(torch_logits(reloaded(pair, tmp_path / "ours")), expected, **CLOSE)
    print(f"{name}: logits within {np.abs(logits(pair.ours, params, adapters) - expected).max():.1e}")
    base, copy = load_peft(tmp_path / "ours", pair.ours)
    np.testing.assert_array_equal(logits(pair.ours, base, copy), logits(pair.ours, params, adapters))


def test_files_that_disagree(tied, tmp_path):
    """The head's tensors are the transposes of the embedding's, and both have one base."""
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    with_peft(tied, config).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for name, message in {
        "lm_head.lora_A.weight": "is not the transpose of",
        "lm_head.base_layer.weight": "differs from the embedding",
    }.items():
        full = f"base_model.model.{name}"
        save_file({**stored, full: stored[full] + 1}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(sx.SboraxError, match=message):
            load_peft(tmp_path, tied.ours)
    save_file({n: t for n, t in stored.items() if "lm_head" not in n}, tmp_path / "adapter_model.safetensors")
    assert nodes(load_peft(tmp_path, tied.ours)[1]).keys() == {TABLE}


def test_kinds_of_peft_without_embeddings(untied, tmp_path):
    with_peft(untied, peft.LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    loha = {"peft_type": "LOHA", "target_modules": ["embed_tokens"], "r": 2}
    for changed in ({**config, "use_dora": True}, {**config, "init_lora_weights": "pissa"}, loha):
        file.write_text(json.dumps(changed))
        with pytest.raises(sx.SboraxError, match="embed_tokens: .* cannot adapt the table") as caught:
            load_peft(tmp_path, untied.ours)
        assert "\n" not in str(caught.value)


def attached(pair, rules, seed=0):
    params, adapters = sx.attach(jax.random.key(seed), pair.ours.params, rules)
    return params, shaken(adapters, seed)


EITHER = sx.LoRA(rank=3, alpha=5.0)
RULES = {
    "shared": ([("embed_tokens", EITHER)], {TABLE}, {TABLE}),
    "apart": ([("embed_tokens|lm_head", EITHER)], {LOOKUP, HEAD}, {TABLE, HEAD}),
    "look-ups": ([("lm_head", None), ("embed_tokens", EITHER)], {LOOKUP}, {TABLE}),
    "head": ([("lm_head", EITHER)], {HEAD}, {HEAD}),
    "neither": ([(".*", EITHER)], set(), {HEAD}),
}
"""Rules, and the paths that they give adapters outside of the layers: where the head is tied, and where it is not."""


@pytest.mark.parametrize("name", RULES)
def test_rules(name, tied, untied):
    rules, *expected = RULES[name]
    for pair, paths in zip((tied, untied), expected, strict=True):
        planned = sx.plan(pair.ours.abstract(), rules)
        assert {site.path for site in planned.sites if not site.path.startswith("layers/")} == paths
        assert {site.shape for site in planned.sites if site.path in (TABLE, LOOKUP)} <= {(64, 32)}
        assert all(path.endswith("/kernel") for path in planned.untouched)
        params, adapters = sx.attach(jax.random.key(0), pair.ours.params, rules)
        assert nodes(adapters).keys() == {site.path for site in planned.sites}
        if name != "neither":
            assert sx.count(adapters) == len(paths) * 3 * (64 + 32)
        base = logits(pair.ours, pair.ours.params, None)
        np.testing.assert_allclose(logits(pair.ours, params, adapters), base, rtol=0, atol=1e-5)


def test_merged(tied, untied):
    """A merged table is the adapted one. Without a single table that is both, merging is refused."""
    for pair, name in ((tied, "shared"), (untied, "apart")):
        params, adapters = attached(pair, RULES[name][0])
        expected = logits(pair.ours, params, adapters)
        assert np.abs(expected - logits(pair.ours, params, None)).max() > 0.05
        np.testing.assert_allclose(logits(pair.ours, sx.merge(params, adapters), None), expected, rtol=0, atol=2e-5)
    for name in ("apart", "look-ups", "head"):
        with pytest.raises(sx.SboraxError, match="the head is tied to the embedding and does not have its adapter"):
            sx.merge(*attached(tied, RULES[name][0]))


def test_start_is_that_of_peft(tied, untied):
    """a = 0; b ~ N(0, 1), but where the head shares it, as A of a kernel."""
    wide = sx.LoRA(rank=30)
    starts = [nodes(sx.attach(jax.random.key(0), pair.ours.params, [("embed_tokens", wide)])[1])[TABLE].train
              for pair in (untied, tied)]  # fmt: skip
    for start, deviation in zip(starts, (1.0, 1 / np.sqrt(3 * 32)), strict=True):
        assert not start["a"].any()
        np.testing.assert_allclose(start["b"].std(), deviation, rtol=0.05)
    assert np.abs(starts[1]["b"]).max() < 1 / np.sqrt(32)


@pytest.fixture(scope="module")
def narrow():
    """A tied model with sizes that every method can divide."""
    config = dataclasses.replace(WIDE, hidden_size=96, intermediate_size=64, num_hidden_layers=1, head_dim=12)
    model = LanguageModel(Llama(config), {}, config, None)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape, np.float32)), model.abstract())
    return dataclasses.replace(model, params=params)


THIN = [case for case in METHODS if not why_no_table(case.method, "tied")]
OTHERS = [case for case in METHODS if why_no_table(case.method, "tied")]


@pytest.mark.parametrize("case", nightly_unless(THIN[2:3], THIN), ids=lambda case: case.name)
def test_methods_with_thin_factors(case, narrow):
    """The look-up, and the tied head, are those of the merged table."""
    params, adapters = sx.attach(jax.random.key(0), narrow.params, [("embed_tokens", case.method)])
    assert sx.count(adapters) == case.count(128, 96) + case.shared(128, 96)
    base = logits(narrow, params, None)
    if case.method.identity_at_init:
        np.testing.assert_allclose(logits(narrow, params, adapters), base, rtol=0, atol=1e-4)
    adapters = shaken(adapters)
    expected = logits(narrow, sx.merge(params, adapters), None)
    assert np.abs(expected - base).max() > 1e-4
    np.testing.assert_allclose(logits(narrow, params, adapters), expected, rtol=1e-4, atol=1e-4)


def test_other_methods_are_refused(tied):
    assert {"DoRA", "PiSSA", "MoSARA", "ResLoRA", "Bat", "PVeRA"} <= {type(case.method).__name__ for case in OTHERS}
    params = tied.ours.abstract()
    for case in OTHERS:
        with pytest.raises(sx.SboraxError, match="cannot adapt the table of the embedding: .*; ") as caught:
            sx.plan(params, [("embed_tokens", case.method)])
        assert "\n" not in str(caught.value)


DROPPING = [(case.method, rate) for case in THIN for rate in sorted(OUTPUT_DROPOUTS) if hasattr(case.method, rate)]


@pytest.mark.parametrize(("method", "rate"), DROPPING, ids=str)
def test_rates_of_outputs_are_refused_where_nothing_is_projected(method, rate, tied):
    params, dropping = tied.ours.abstract(), dataclasses.replace(method, **{rate: 0.5})
    for rules in ([("embed_tokens", dropping)], [("lm_head", None), ("embed_tokens", sx.scale(dropping, 2.0))]):
        with pytest.raises(sx.SboraxError, match=f"cannot adapt the table of the embedding: .*{rate}.*; ") as caught:
            sx.plan(params, rules)
        assert "\n" not in str(caught.value)
    # A head of its own is a projection, though its kernel is the table.
    sx.plan(params, [("lm_head", dropping)])


def products(jaxpr):
    """The shapes of all results of products in a program and in the programs within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from (out.aval.shape for out in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


def outputs(pair, params, adapters, key=None):
    tokens = jnp.asarray(TOKENS[:, :-1])
    batch = {
        "tokens": tokens,
        "targets": jnp.asarray(TOKENS[:, 1:]),
        "counts": jnp.arange(tokens.size).reshape(tokens.shape) % 3 > 0,
        "segments": jnp.ones_like(tokens),
    }
    return Outputs(pair.ours.hidden(params, adapters, tokens), batch, pair.ours, params, adapters, key=key)


WHERE = [(model, name) for model in ("tied", "untied") for name in ("shared", "apart", "look-ups", "head")]


@pytest.mark.parametrize("where", nightly_unless(WHERE[:1], WHERE), ids=" ".join)
def test_the_loss_sees_the_adapter(where, request):
    """The loss in chunks, and its gradient, are those of all logits; no product is as large as the table."""
    pair = request.getfixturevalue(where[0])
    params, adapters = attached(pair, RULES[where[1]][0])
    train, frozen = sx.split(adapters)

    def in_chunks(train):
        return outputs(pair, params, sx.combine(train, frozen)).cross_entropy()

    def by_logits(train):
        result = outputs(pair, params, sx.combine(train, frozen))
        scores = jax.nn.log_softmax(pair.ours.apply(params, sx.combine(train, frozen), result.batch["tokens"]))
        log_probs = jnp.take_along_axis(scores, result.batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(result.batch["counts"], log_probs, 0.0))

    ours, expected = (jax.jit(jax.value_and_grad(loss))(train) for loss in (in_chunks, by_logits))
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert all(leaf.any() for leaf in jax.tree.leaves(ours[1]))
    sizes = set(products(jax.make_jaxpr(jax.value_and_grad(in_chunks))(train).jaxpr))
    assert sizes and not sizes & {(64, 32), (32, 64)}
    total, terms = outputs(pair, params, adapters).cross_entropies()
    np.testing.assert_allclose([total, terms.sum()], expected[0], rtol=1e-5)


def test_dropout_reaches_a_shared_head_alone(tied):
    """PEFT's look-ups drop nothing."""
    params, adapters = attached(tied, [("embed_tokens", sx.LoRA(rank=3, dropout=0.5))])
    hidden = [
        tied.ours.hidden(params, adapters, jnp.asarray(TOKENS), dropout_key=key) for key in (None, jax.random.key(1))
    ]
    np.testing.assert_array_equal(*hidden)
    scores = [tied.ours.head(params, adapters, hidden[0], dropout_key=key) for key in (None, jax.random.key(1))]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3


class Foreign(Llama):
    """A decoder that does not say that it reads such adapters."""

    adapts_tables = False


def test_a_decoder_that_does_not_read_them(tied):
    params, adapters = attached(tied, RULES["shared"][0])
    module = Foreign(tied.ours.config)
    with pytest.raises(sx.SboraxError, match="embed_tokens/embedding.* would be ignored"):
        dataclasses.replace(tied.ours, module=module).apply(params, adapters, jnp.asarray(TOKENS))
    with pytest.raises(sx.SboraxError, match="embed_tokens/embedding"):
        sx.apply_linen(module, {"params": params}, adapters, jnp.asarray(TOKENS))


@pytest.mark.parametrize("name", nightly_unless(["apart"], ["shared", "apart", "look-ups"]))
def test_saved_adapters(name, tied, tmp_path):
    params, adapters = attached(tied, RULES[name][0])
    save_adapter(tmp_path, adapters, rules=RULES[name][0], base=fingerprint(tied.ours.params))
    restored, copy = load_adapter(tmp_path, tied.ours.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(copy, adapters)
    chex.assert_trees_all_equal((restored, copy), (params, adapters))
    # Earlier versions wrote scalars with an axis.
    file, plan = tmp_path / "adapter.safetensors", tmp_path / "plan.json"
    save_file({name: leaf.reshape(leaf.shape or 1) for name, leaf in load_file(file).items()}, file)
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "digests": None}))
    chex.assert_trees_all_equal_shapes_and_dtypes(load_adapter(tmp_path, tied.ours.params)[1], adapters)


def test_sums_that_no_file_of_peft_holds(tied, tmp_path):
    trees = [attached(tied, RULES[name][0])[1] for name in ("shared", "head")]
    with pytest.raises(sx.SboraxError, match="no PEFT adapter is such a sum"):
        save_peft(tmp_path, tied.ours, tied.ours.params, sx.add(*trees))
    total = sx.add(trees[0], attached(tied, [("embed_tokens", sx.LoRA(rank=2))], seed=1)[1])
    save_peft(tmp_path, tied.ours, tied.ours.params, total)
    expected = logits(tied.ours, tied.ours.params, total)
    np.testing.assert_allclose(torch_logits(reloaded(tied, tmp_path)), expected, **CLOSE)


@pytest.mark.nightly
def test_a_base_in_four_bits():
    """The table stays as it is, and so does its adapter's change."""
    model = LanguageModel(Llama(WIDE), {}, WIDE, None)
    params = jax.jit(model.module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    quantised = quantise_base(params, "nf4")
    assert isinstance(quantised["layers"]["mlp"]["up_proj"]["kernel"], NF4Array)
    quantised, adapters = sx.attach(jax.random.key(0), quantised, [("embed_tokens|q_proj", sx.LoRA(rank=3))])
    adapters = shaken(adapters)
    merged = sx.merge(quantised, nest({TABLE: nodes(adapters)[TABLE]}))
    layers = nest({path: node for path, node in nodes(adapters).items() if path != TABLE})
    expected = model.apply(merged, layers, jnp.asarray(TOKENS))
    np.testing.assert_allclose(model.apply(quantised, adapters, jnp.asarray(TOKENS)), expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny tied model and a tiny data set."""
    place = tmp_path_factory.mktemp("places")
    return str(write_model(place / "model")), str(write_data(place / "data.jsonl"))


def an_experiment(places, rules, **changes):
    data = sx.Data(places[1], template="{instruction}", answer=" {output}", max_length=32, buckets=(32,))
    settings = {"optimizer": sx.Optimizer(lr=1e-2), "steps": 4, "batch_size": 2, "save": sx.Save(every=2)}
    return sx.Experiment(**{"model": places[0], "data": data, "rules": rules, **settings, **changes})


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["shared", "apart", "look-ups"])
def test_a_run_and_what_is_made_of_it(name, places, tmp_path, capsys):
    """Training, its numbers, text over the cache of keys and values, export to PEFT, and a merged model."""
    rules = tuple(sx.Rule(*rule) for rule in RULES[name][0])
    run = tmp_path / "run"
    train(an_experiment(places, rules, steps=8), run)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0] - 0.05
    model = load_model(places[0])
    params, adapters = load_adapter(run / "adapter", model.params)
    assert {path for path in nodes(adapters)} == RULES[name][1]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_parameters"] == sx.count(adapters)
    prompts = [[3, 4, 5], [7]]
    text = generate(model, params, adapters, prompts, 6)
    for prompt, new in zip(prompts, text, strict=True):
        tokens = jnp.asarray([prompt + new])
        greedy = np.argmax(model.apply(params, adapters, tokens)[0], axis=-1)[len(prompt) - 1 : -1]
        assert greedy.tolist() == new
    assert main(["export", str(run), str(tmp_path / "peft")]) == 0
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(places[0]), tmp_path / "peft"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(model.apply(params, adapters, jnp.asarray(TOKENS)), expected, **CLOSE)
    capsys.readouterr()
    if name == "shared":
        assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
        merged = load_model(tmp_path / "merged")
        np.testing.assert_allclose(merged.apply(merged.params, None, jnp.asarray(TOKENS)), expected, **CLOSE)
    else:
        assert main(["merge", str(run), str(tmp_path / "merged")]) == 2
        assert "the head is tied to the embedding and does not have its adapter" in capsys.readouterr().err


@pytest.mark.nightly
def test_a_sweep(places, tmp_path):
    """Members are their single runs, one after the other and side by side."""
    experiment = an_experiment(places, (sx.Rule("embed_tokens|lm_head", EITHER),))
    for place, options in {"mapped": {}, "together": {"at_once": 2}}.items():
        sweep(Sweep(experiment, {"optimizer.lr": (1e-2, 3e-2)}, **options), tmp_path / place, echo=lambda _: None)
    train(dataclasses.replace(experiment, optimizer=sx.Optimizer(lr=3e-2)), tmp_path / "alone")
    alone = load_adapter(tmp_path / "alone" / "adapter", load_model(places[0]).params)[1]
    for place in ("mapped", "together"):
        members = sorted(path.parent for path in (tmp_path / place).glob("*/adapter"))
        assert len(members) == 2
        member = load_adapter(members[1] / "adapter", load_model(places[0]).params)[1]
        chex.assert_trees_all_close(member, alone, rtol=0, atol=1e-5)


def test_a_form_that_peft_has_for_projections_alone_is_named(tied, tmp_path):
    """PEFT's BD-LoRA is of projections: an embedding's adapter of the same method is plain LoRA there."""
    params, adapters = sx.attach(
        jax.random.key(0), tied.ours.params, [("q_proj|embed_tokens|lm_head", sx.BDLoRA(rank=2, blocks=2))]
    )
    with pytest.raises(sx.SboraxError, match="BDLoRA in the form of LoRA and lm_head has BDLoRA in the form of BDLoRA"):
        save_peft(tmp_path, tied.ours, params, adapters)


def test_optimisers_that_tell_factors_apart(tied):
    """LoRA+ has one rate for an embedding, and LoRA-FA, which would freeze a at zero, refuses it."""
    _, adapters = attached(tied, RULES["apart"][0])
    updates = lora_plus(16.0).update(sx.split(adapters)[0], optax.EmptyState())[0]
    ratios = {
        path: updates_of.train["b"] / nodes(adapters)[path].train["b"] for path, updates_of in nodes(updates).items()
    }
    np.testing.assert_allclose(ratios[LOOKUP], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratios[HEAD], 16.0, rtol=1e-6)
    with pytest.raises(sx.SboraxError, match="embed_tokens/lookup: a starts at zero there"):
        split_lora_fa(adapters)
