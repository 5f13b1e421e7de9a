"""Planning, composition and the verbs on whole trees: what the contract on one kernel cannot show."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sborax as sx
from sborax.adapters.core import Adapter
from sborax.adapters.paths import module_path
from sborax.adapters.tree import nodes, stack_of

KEY = jax.random.key(0)


def params(layers: int = 3):
    def kernel(seed: int, *shape: int):
        return 0.3 * jax.random.normal(jax.random.key(seed), (layers, *shape))

    return {
        "embed_tokens": {"embedding": jnp.ones((11, 16))},
        "layers": {
            "self_attn": {"q_proj": {"kernel": kernel(1, 16, 24)}, "v_proj": {"kernel": kernel(2, 16, 8)}},
            "mlp": {"up_proj": {"kernel": kernel(3, 16, 32), "bias": jnp.zeros((layers, 32))}},
        },
        "lm_head": {"kernel": jnp.ones((16, 11))},
    }


def trained(adapters, seed: int = 5):
    train, frozen = sx.split(adapters)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    tuned = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return sx.combine(jax.tree.unflatten(treedef, tuned), frozen)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ([("k_proj", sx.LoRA())], "rule 'k_proj' matches no kernel"),
        ([("self_attn", sx.LoRA()), ("q_proj", sx.Bone())], "rule 'q_proj' matches no kernel"),
        ([("q_proj", sx.LoRA(rank=17))], "layers/self_attn/q_proj/kernel (16, 24): rank must lie in 1..16"),
        ([("q_proj", sx.LoRA(rank=0))], "rank must lie in 1..16"),
        ([("q_proj", sx.LoRA(rslora=True))], "rslora divides alpha by sqrt(rank), but alpha is None"),
        ([("q_proj", sx.Bat(rank=5))], "layers/self_attn/q_proj/kernel (16, 24): the block size 5 must divide"),
        ([("v_proj", sx.Bone(rank=4, mini_rank=3))], "mini_rank must divide 8 columns"),
        ([sx.Rule("q_proj", sx.LoRA(), layers=(7,))], "matches no kernel"),
        ([sx.Rule("q_proj", sx.LoRA(), stack_axes=0)], "say which are input and output"),
        ([("(q_proj", sx.LoRA())], "is not a regular expression"),
        ([("q_proj", sx.SuperTuning(alpha=3.0))], "of a and b, which lora_rank=0 leaves out"),
        ([("q_proj", sx.Lily(rank=2, scale=0.0))], "scale must be above 0"),
        ([("q_proj", sx.LoRA(rank=2, dropout=1.0))], "dropout must lie in [0, 1)"),
    ],
)
def test_mistakes_are_found_at_planning_and_named(rules, says):
    with pytest.raises(sx.SboraxError) as caught:
        sx.attach(KEY, params(), rules)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_first_rule_wins_and_none_leaves_a_kernel_alone():
    plan = sx.plan(params(), [("v_proj", None), ("self_attn", sx.LoRA(rank=2)), ("up_proj", sx.Bone(rank=2))])
    assert [site.path.split("/")[2] for site in plan.sites] == ["up_proj", "q_proj"]
    assert plan.untouched == ("layers/self_attn/v_proj/kernel", "lm_head/kernel")


def test_a_plan_needs_shapes_alone():
    shapes = jax.eval_shape(params)
    rules = [("q_proj", sx.DoRA(rank=2)), ("up_proj", sx.SBoRA(rank=4))]
    plan = sx.plan(shapes, rules)
    abstract = jax.eval_shape(lambda: sx.attach(KEY, params(), plan)[1])
    _, real = sx.attach(KEY, params(), rules)
    chex.assert_trees_all_equal_shapes_and_dtypes(abstract, real)
    assert sx.count(abstract) == sx.count(real) == 3 * (2 * (16 + 24) + 24 + 4 * 32)


def test_the_base_is_the_same_arrays_unless_a_method_rewrites_it():
    start = params()
    end, _ = sx.attach(KEY, start, [("q_proj", sx.LoRA(rank=2)), ("v_proj", sx.PiSSA(rank=2))])
    assert end["layers"]["self_attn"]["q_proj"]["kernel"] is start["layers"]["self_attn"]["q_proj"]["kernel"]
    assert end["embed_tokens"]["embedding"] is start["embed_tokens"]["embedding"]
    assert not np.array_equal(
        end["layers"]["self_attn"]["v_proj"]["kernel"], start["layers"]["self_attn"]["v_proj"]["kernel"]
    )


def test_split_and_combine_are_inverse():
    _, adapters = sx.attach(KEY, params(), [("self_attn", sx.SBoRA(rank=3)), ("up_proj", sx.DoRA(rank=2))])
    train, frozen = sx.split(adapters)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(train))
    chex.assert_trees_all_equal(sx.combine(train, frozen), adapters)


def test_halves_that_do_not_belong_together_are_refused():
    base = params()
    halves = {
        name: sx.split(sx.attach(KEY, base, [("mlp", method)])[1])
        for name, method in {"OFT": sx.OFT(block=8, eps=1e-3), "LoRA": sx.LoRA(rank=2), "DoRA": sx.DoRA(rank=2)}.items()
    }
    elsewhere, _ = sx.split(sx.attach(KEY, base, [("q_proj", sx.LoRA(rank=2))])[1])
    for train, frozen, says in (
        (*reversed(halves["OFT"]), "up_proj/kernel: give the half of the trained leaves first"),
        (halves["LoRA"][0], halves["DoRA"][1], "up_proj/kernel: the halves have different methods"),
        (halves["LoRA"][0], sx.combine(*halves["LoRA"]), "give the half of the trained leaves first"),
        (elsewhere, halves["LoRA"][1], "up_proj/kernel: is in one half only"),
        (base, halves["LoRA"][1], "expected a tree of adapters"),
    ):
        with pytest.raises(sx.SboraxError, match=f"combine: .*{says}"):
            sx.combine(train, frozen)


@pytest.mark.parametrize("verb", ["split", "link", "rebase", "scale"])
def test_parameters_are_no_tree_of_adapters(verb):
    base = params()
    call = {"split": sx.split, "link": sx.link, "rebase": lambda tree: sx.rebase(base, tree)}
    call["scale"] = lambda tree: sx.scale(tree, 0.5)
    with pytest.raises(sx.SboraxError, match=f"{verb}: expected a tree of adapters"):
        call[verb](base)


def test_merge_leaves_what_no_adapter_touches():
    base = params()
    _, adapters = sx.attach(KEY, base, [("q_proj", sx.LoRA(rank=2))])
    merged = sx.merge(base, trained(adapters))
    assert merged["lm_head"]["kernel"] is base["lm_head"]["kernel"]
    with pytest.raises(sx.SboraxError, match="no kernel at this path"):
        sx.merge({"other": {"kernel": jnp.ones((2, 2))}}, adapters)


def test_sbora_merge_changes_exactly_its_rows_bit_for_bit():
    kernel = jnp.asarray(np.where(np.arange(16 * 24).reshape(16, 24) % 3, 0.25, -0.0), jnp.float32)
    for variant, axis in (("FA", 0), ("FB", 1)):
        base = {"proj": {"kernel": kernel}}
        _, adapters = sx.attach(KEY, base, [("proj", sx.SBoRA(rank=5, variant=variant))])
        merged = np.asarray(sx.merge(base, trained(adapters))["proj"]["kernel"])
        changed = np.any(merged.view(np.uint32) != np.asarray(kernel).view(np.uint32), axis=1 - axis)
        assert np.flatnonzero(changed).tolist() == adapters["proj"]["kernel"].frozen["idx"].tolist()


def deltas(base, adapters):
    return jax.tree.map(jnp.subtract, sx.merge(base, adapters), base)


def test_laws_of_add_and_scale():
    base = params()
    first, second = (
        trained(sx.attach(jax.random.key(seed), base, [("self_attn", method)])[1], seed)
        for seed, method in ((1, sx.LoRA(rank=2)), (2, sx.SBoRA(rank=4)))
    )
    total = deltas(base, sx.add(first, second))
    chex.assert_trees_all_close(total, deltas(base, sx.add(second, first)), atol=1e-6)
    chex.assert_trees_all_close(total, jax.tree.map(jnp.add, deltas(base, first), deltas(base, second)), atol=1e-6)
    chex.assert_trees_all_equal(sx.merge(base, sx.scale(first, 0.0)), base)
    half = jax.tree.map(lambda leaf: 0.5 * leaf, deltas(base, first))
    chex.assert_trees_all_close(deltas(base, sx.scale(first, 0.5)), half, atol=1e-6)
    _, adapters = sx.attach(KEY, base, [("up_proj", sx.LoRA(rank=2))])
    assert set(nodes(sx.add(first, adapters))) == set(nodes(first)) | set(nodes(adapters))


def test_only_additive_methods_are_added_and_only_factors_stood_on():
    with pytest.raises(sx.SboraxError, match="DoRA rewrites the weight as a whole"):
        sx.add(sx.LoRA(), sx.DoRA())
    with pytest.raises(sx.SboraxError, match="Bone has no leaf 'a'"):
        sx.chain(sx.Bone(), sx.DoRA())
    with pytest.raises(sx.SboraxError, match="LoRA cannot stand on"):
        sx.chain(sx.PiSSA(), sx.LoRA())


def test_a_chain_starts_where_its_first_link_does_and_trains_as_its_second():
    base = params()
    rewritten, chained = sx.attach(KEY, base, [("q_proj", sx.chain(sx.PiSSA(rank=4), sx.DoRA()))])
    alone, pissa = sx.attach(KEY, base, [("q_proj", sx.PiSSA(rank=4))])
    chex.assert_trees_all_equal(rewritten, alone)
    (node,), (plain,) = nodes(chained).values(), nodes(pissa).values()
    chex.assert_trees_all_equal(node.train["a"], plain.train["a"])
    norm = jnp.linalg.norm(base["layers"]["self_attn"]["q_proj"]["kernel"], axis=1)
    chex.assert_trees_all_close(node.train["m"], norm, rtol=1e-5)


def test_different_methods_on_different_layers_of_one_stack():
    base = params()
    rules = [sx.Rule("q_proj", sx.LoRA(rank=2), layers=slice(0, 1)), sx.Rule("q_proj", sx.DoRA(rank=3), layers=(-1,))]
    _, adapters = sx.attach(KEY, base, rules)
    assert sx.count(adapters) == 2 * (16 + 24) + 3 * (16 + 24) + 24
    merged = sx.merge(base, trained(adapters))["layers"]["self_attn"]["q_proj"]["kernel"]
    matches = [
        np.array_equal(a, b) for a, b in zip(merged, base["layers"]["self_attn"]["q_proj"]["kernel"], strict=True)
    ]
    assert matches == [False, True, False]


@pytest.mark.usefixtures("strict")
def test_a_rewritten_half_precision_stack_keeps_the_bits_of_other_layers():
    base = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    end, _ = sx.attach(KEY, base, [sx.Rule("q_proj", sx.OLoRA(rank=2), layers=(1,))])
    old, new = (tree["layers"]["self_attn"]["q_proj"]["kernel"] for tree in (base, end))
    assert new.dtype == jnp.bfloat16
    assert [bool(jnp.array_equal(a, b)) for a, b in zip(old, new, strict=True)] == [True, False, True]


def test_hyper_parameters_share_a_tree_structure_and_a_compilation():
    base = params()
    first, second = (sx.attach(KEY, base, [("q_proj", sx.LoRA(rank=2, alpha=alpha))])[1] for alpha in (1.0, 2.0))
    chex.assert_trees_all_equal_structs(first, second)
    (node,) = nodes(jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)).values()
    assert node.frozen["scale"].tolist() == [[0.5] * 3, [1.0] * 3]


def test_specs_follow_the_kernel():
    _, adapters = sx.attach(
        KEY, params(), [("q_proj", sx.DoRA(rank=2)), ("v_proj", sx.SBoRA(rank=2)), ("up_proj", sx.Bat(rank=8))]
    )
    kernel = P(None, "fsdp", "tensor")
    specs = sx.specs(adapters, jax.tree.map(lambda leaf: kernel if leaf.ndim == 3 else P(), params()))
    leaves = {path: node.train | node.frozen for path, node in nodes(specs).items()}
    assert leaves == {
        "layers/self_attn/q_proj/kernel": {
            "a": P(None, "fsdp", None),
            "b": P(None, None, "tensor"),
            "m": P(None, "tensor"),
            "w2": P(None, "tensor"),
            "scale": P(None),
        },
        "layers/self_attn/v_proj/kernel": {"b": P(None, None, "tensor"), "idx": P(None, None), "scale": P(None)},
        "layers/mlp/up_proj/kernel": {"d": P(None, "tensor", None, None)},
    }


@pytest.mark.parametrize(
    ("in_axes", "spec", "of_in", "of_out"),
    [
        (2, P("tensor", None, "fsdp"), "tensor", "fsdp"),
        (1, P("fsdp", "tensor", None), "fsdp", "tensor"),
        (1, P("fsdp", "tensor"), "fsdp", "tensor"),
        (2, P("tensor"), "tensor", None),
        # Parts of the second axis lie apart in the flattened one.
        (2, P(None, "tensor", "fsdp"), None, "fsdp"),
        (1, P("fsdp", "tensor", "data"), "fsdp", None),
    ],
    ids=str,
)
@pytest.mark.parametrize("stack", [(), ("data",)], ids=["flat", "stacked"])
def test_specs_of_a_kernel_of_several_axes_are_those_of_its_flattened_sides(in_axes, spec, of_in, of_out, stack):
    params = {"proj": {"kernel": jnp.zeros((*(2,) * len(stack), 4, 8, 16))}}
    _, adapters = sx.attach(KEY, params, [sx.Rule("proj", sx.LoRA(rank=2), in_axes=in_axes, stack_axes=len(stack))])
    node = sx.specs(adapters, {"proj": {"kernel": P(*stack, *spec)}})["proj"]["kernel"]
    assert node.train == {"a": P(*stack, of_in, None), "b": P(*stack, None, of_out)}
    assert node.frozen == {"scale": P(*stack)}


def test_kernels_of_many_axes_are_read_as_in_and_out():
    kernel = jax.random.normal(KEY, (6, 2, 4))
    base = {"attention": {"kernel": kernel}}
    with pytest.raises(sx.SboraxError, match="in_axes"):
        sx.plan(base, [("attention", sx.LoRA(rank=2))])
    for in_axes, shape in ((1, (6, 8)), (2, (12, 4))):
        _, adapters = sx.attach(KEY, base, [sx.Rule("attention", sx.LoRA(rank=2), in_axes=in_axes)])
        node = trained(adapters)["attention"]["kernel"]
        merged = sx.merge(base, {"attention": {"kernel": node}})["attention"]["kernel"]
        delta = node.frozen["scale"] * node.train["a"] @ node.train["b"]
        assert delta.shape == shape
        chex.assert_trees_all_close(merged, kernel + delta.reshape(kernel.shape), atol=1e-6)


def test_paths_name_modules_without_their_layer():
    assert module_path("layers/12/mlp/up_proj/kernel") == ("layers/mlp/up_proj", 12)
    assert module_path("lm_head/kernel") == ("lm_head", None)


def test_dropout_acts_with_a_key_alone_and_keeps_the_mean():
    weight = jnp.zeros((64, 8))
    _, adapters = sx.attach(KEY, {"p": {"kernel": weight}}, [("p", sx.LoRA(rank=4, dropout=0.5))])
    node = trained(adapters)["p"]["kernel"]
    x = jnp.ones((4000, 64))
    still = sx.linear(x, weight, node)
    chex.assert_trees_all_equal(still, sx.linear(x, weight, node, sx.Context()))
    dropped = sx.linear(x, weight, node, sx.Context(key=jax.random.key(1)))
    assert not np.array_equal(still, dropped)
    chex.assert_trees_all_close(dropped.mean(axis=0), still[0], atol=0.05 * float(jnp.abs(still).max()))


def test_stack_of_a_node():
    _, adapters = sx.attach(KEY, params(), [("q_proj", sx.LoRA(rank=2)), ("lm_head", sx.LoRA(rank=2))])
    assert {path: stack_of(node) for path, node in nodes(adapters).items()} == {
        "layers/self_attn/q_proj/kernel": (3,),
        "lm_head/kernel": (),
    }
    assert isinstance(adapters["lm_head"]["kernel"], Adapter)
