"""LoRA+ and LoRA-FA: PEFT's groups, and PEFT's steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import peft.optimizers.lorafa
import pytest
import torch
import torch_pair  # noqa: F401 - replaces the CUDA extension of BOFT
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

import sborax as sx
from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.optim import groups, lora_fa, lora_plus, project_lora_fa
from sborax.train.optimizer import make_optimizer

IN, HIDDEN, OUT = 11, 8, 7
RANK, ALPHA = 3, 6
STEPS = 6


class Net(torch.nn.Module):
    """Two linear layers with a norm between them."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(IN, HIDDEN)
        self.norm = torch.nn.RMSNorm(HIDDEN)
        self.second = torch.nn.Linear(HIDDEN, OUT)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def torch_model(dora=False, bias="none", norm=False):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["first", "second"],
        use_dora=dora,
        bias=bias,
        modules_to_save=["norm"] if norm else None,
    )
    model = peft.get_peft_model(Net(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def our_name(name: str) -> str:
    """PEFT's name for a trained parameter as a path in our training tree."""
    module, leaf = name.removeprefix("base_model.model.").split(".", 1)
    if "modules_to_save" in leaf:
        return f"base/{module}/scale"
    last = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}.get(leaf.split(".")[0])
    return f"adapters/{module}/kernel/train/{last}" if last else f"base/{module}/bias"


def our_tree(model, dora):
    """The trained parameters in our form: `{"adapters": ..., "base": ...}`, and the frozen halves."""
    state = {our_name(name): value for name, value in model.named_parameters() if value.requires_grad}
    arrays = {name: jnp.asarray(value.detach().numpy()) for name, value in state.items()}
    arrays = {name: leaf.T if leaf.ndim == 2 else leaf for name, leaf in arrays.items()}
    method = sx.DoRA(rank=RANK) if dora else sx.LoRA(rank=RANK)
    train, frozen = {}, {}
    for module in ("first", "second"):
        head = f"adapters/{module}/kernel/train/"
        leaves = {name.removeprefix(head): leaf for name, leaf in arrays.items() if name.startswith(head)}
        train[f"{module}/kernel"] = sx.Adapter(leaves, {}, method)
        frozen[f"{module}/kernel"] = sx.Adapter({}, {"scale": jnp.float32(ALPHA / RANK)}, method)
    base = {name.removeprefix("base/"): leaf for name, leaf in arrays.items() if name.startswith("base/")}
    return {"adapters": nest(train), "base": base}, nest(frozen)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": "lora_only"}, {"bias": "all", "norm": True}])
def test_groups_are_those_of_peft(dora, options):
    model = torch_model(dora, **options)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {(1e-3, 0.1): "a", (16e-3, 0.1): "b", (16e-3, 0.0): "b_no_decay"}
    theirs = {
        our_name(named[id(parameter)]): rates[group["lr"], group["weight_decay"]]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    tree, _ = our_tree(model, dora)
    ours = {
        jax.tree_util.keystr(path, simple=True, separator="/"): group
        for path, group in jax.tree_util.tree_leaves_with_path(groups(tree))
    }
    assert ours == theirs
    assert set(ours.values()) >= {"a", "b"}


def test_groups_in_stacks_and_composites():
    params = {"layers": {"p": {"kernel": jnp.ones((3, IN, OUT))}}}
    method = sx.add(sx.LoRA(rank=2), sx.SBoRA(rank=2))
    _, adapters = sx.attach(jax.random.key(0), params, [("p", method)])
    (node,) = nodes(groups(sx.split(adapters)[0])).values()
    assert node.train == {"0": {"a": "a", "b": "b"}, "1": {"b": "b"}}
    _, adapters = sx.attach(jax.random.key(0), params, [("p", sx.DoRA(rank=2))])
    (node,) = nodes(groups(sx.split(adapters)[0])).values()
    assert node.train == {"a": "a", "b": "b", "m": "b"}


COMPOSED = {
    "sum": [("p", sx.add(sx.LoRA(rank=2), sx.SBoRA(rank=2)))],
    "multiple": [("p", sx.scale(sx.LoRA(rank=2), 0.5))],
    "chain": [("p", sx.chain(sx.PiSSA(rank=2), sx.DoRA(rank=2)))],
    "activated": [("p", sx.Activated(sx.LoRA(rank=2), tokens=(3,)))],
    "some layers": [sx.Rule("p", sx.LoRA(rank=2), layers=(0, 2))],
    "several methods": [sx.Rule("p", sx.LoRA(rank=2), layers=(0,)), sx.Rule("p", sx.Bone(rank=2), layers=(1, 2))],
    "nested": [("p", sx.scale(sx.add(sx.LoRA(rank=2), sx.scale(sx.PiSSA(rank=2), 2.0)), 0.5))],
}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed_adapters_take_steps(name):
    """Of both halves and of the whole tree; b moves `ratio` times as far as without it."""
    params = {"layers": {"p": {"kernel": jnp.ones((3, IN, OUT))}}}
    _, adapters = sx.attach(jax.random.key(0), params, COMPOSED[name])
    train, _ = sx.split(adapters)
    for tree in (train, adapters):
        assert jax.tree.structure(groups(tree)) == jax.tree.structure(tree)
    tx = sx.lora_plus(4.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, train), tx.init(train), train)
    expected = jax.tree.map(lambda group: 1.0 if group == "a" else 4.0, groups(train))
    assert 4.0 in jax.tree.leaves(expected)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.full_like, train, expected))


def test_masked_leaves_have_no_group():
    params = {"layers": {"p": {"kernel": jnp.ones((3, IN, OUT))}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("p", sx.DoRA(rank=2))])
    train, _ = sx.split(adapters)

    def named(tree, name):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == name, tree)

    tx = optax.masked(sx.lora_plus(4.0), lambda tree: named(tree, "b"))
    (node,) = nodes(tx.update(jax.tree.map(jnp.ones_like, train), tx.init(train), train)[0]).values()
    assert {name: float(leaf.max()) for name, leaf in node.train.items()} == {"a": 1.0, "b": 4.0, "m": 1.0}


TARGETS = {"target_modules": ["first", "second"]}
PEERS = [
    (peft.LoraConfig(r=2, kasa_config=peft.KasaConfig(), **TARGETS), sx.KaSA(rank=2)),
    (
        peft.LoraConfig(r=2, use_bdlora=peft.BdLoraConfig(["second"], [], nblocks=2), target_modules=["second"]),
        sx.BDLoRA(rank=2, side="in", blocks=2),
    ),
    (
        peft.LoraConfig(r=2, monteclora_config=peft.MontecloraConfig(num_samples=3, buffer_size=1), **TARGETS),
        sx.MonteCLoRA(rank=2, samples=3),
    ),
    (peft.LoraConfig(r=2, velora_config=peft.VeloraConfig(num_groups=3), **TARGETS), sx.VeLoRA(rank=2, groups=3)),
    (peft.AdaLoraConfig(init_r=3, total_step=10, **TARGETS), sx.AdaLoRA(rank=3)),
    (peft.IA3Config(feedforward_modules=[], **TARGETS), sx.IA3()),
    (peft.LoKrConfig(r=2, **TARGETS), sx.LoKr(rank=2)),
    (peft.LoHaConfig(r=2, **TARGETS), sx.LoHa(rank=2)),
    (peft.HiraConfig(r=3, **TARGETS), sx.HiRA(rank=3)),
    (peft.GloraConfig(r=3, **TARGETS), sx.GLoRA(rank=3)),
    (
        peft.GloraConfig(config_A_B="constant", config_C="vector", config_D_E="vector", **TARGETS),
        sx.GLoRA(rank=3, weight="constant", coupling="vector", bias="vector"),
    ),
    (peft.DeloraConfig(r=3, **TARGETS), sx.DeLoRA(rank=3)),
    (peft.VeraConfig(r=3, **TARGETS), sx.VeRA(rank=3)),
    (peft.PveraConfig(r=3, **TARGETS), sx.PVeRA(rank=3)),
    (peft.TinyLoraConfig(u=3, **TARGETS), sx.TinyLoRA(coefficients=3)),
    (peft.PsoftConfig(r=3, **TARGETS), sx.PSOFT(rank=3)),
    (peft.PeanutConfig(r=3, depth=1, **TARGETS), sx.PEANuT(rank=3, depth=1)),
    (peft.VBLoRAConfig(r=3, num_vectors=5, vector_length=1, **TARGETS), sx.VBLoRA(rank=3, vectors=5, length=1)),
    (peft.UniLoraConfig(r=3, theta_d_length=7, **TARGETS), sx.UniLoRA(rank=3, coefficients=7)),
    (peft.LilyConfig(r=3, **TARGETS), sx.Lily(rank=3)),
    (peft.FrodConfig(progressbar=False, **TARGETS), sx.FRoD()),
    (peft.ShiraConfig(r=2, **TARGETS), sx.SHiRA(rank=2)),
    (peft.SupertuningConfig(sparsity=0.5, r=2, **TARGETS), sx.SuperTuning(sparsity=0.5, lora_rank=2)),
    (peft.OSFConfig(effective_rank=2, **TARGETS), sx.OSF(kept=2)),
    (peft.DeftConfig(r=2, **TARGETS), sx.DEFT(rank=2)),
    (peft.BOFTConfig(boft_block_size=2, target_modules=["second"]), sx.BOFT(block=2)),
    (peft.FourierFTConfig(n_frequency=5, **TARGETS), sx.FourierFT(coefficients=5)),
    (peft.RoadConfig(group_size=2, target_modules=["first"]), sx.RoAd(block=2)),
    (peft.GraloraConfig(r=2, hybrid_r=1, gralora_k=1, **TARGETS), sx.GraLoRA(rank=2, blocks=1, hybrid=1)),
    (peft.WaveFTConfig(n_frequency=5, **TARGETS), sx.WaveFT(coefficients=5)),
    (peft.MissConfig(r=4, **TARGETS), sx.Bone(rank=4)),
    (peft.HRAConfig(r=2, **TARGETS), sx.HRA(rank=2)),
]


@pytest.mark.parametrize(("config", "method"), PEERS, ids=lambda item: type(item).__name__)
def test_groups_are_as_large_as_those_of_peft(config, method):
    """For every method, as many parameters learn faster here as there."""
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), config)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    theirs = {"a": 0, "b": 0}
    for group in optimizer.param_groups:
        theirs["b" if group["lr"] > 1e-3 else "a"] += sum(parameter.numel() for parameter in group["params"])
    shapes = {"first": (IN, HIDDEN), "second": (HIDDEN, OUT)}
    params = {name: {"kernel": jnp.ones(shape), "bias": jnp.ones(shape[1])} for name, shape in shapes.items()}
    _, adapters = sx.attach(jax.random.key(0), params, [("|".join(config.target_modules), method)])
    train, _ = sx.split(adapters)
    ours = {"a": 0, "b": 0}
    for leaf, group in zip(jax.tree.leaves(train), jax.tree.leaves(groups(train)), strict=True):
        ours[group] += leaf.size
    assert ours == theirs
    if not ours["b"]:
        with pytest.raises(SboraxError, match="b_ratio: no trained leaf"):
            make_optimizer(sx.Optimizer(b_ratio=16.0), 10).init(train)


def torch_loss(model, x, y):
    return ((model(x) - y) ** 2).mean()


def batches():
    generator = np.random.default_rng(3)
    return [
        tuple(torch.tensor(generator.normal(size=(5, size)), dtype=torch.float32) for size in (IN, OUT))
        for _ in range(STEPS)
    ]


def follow(model, optimizer, tx, tree, frozen):
    """Both optimisers on the same gradients, torch's, step by step."""
    state = tx.init(tree)
    update = jax.jit(tx.update)
    for x, y in batches():
        optimizer.zero_grad()
        torch_loss(model, x, y).backward()
        grads = {our_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}

        def grad_of(path, leaf, grads=grads):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in grads:
                return jnp.zeros_like(leaf)
            array = grads[name].numpy()
            return jnp.asarray(array.T if array.ndim == 2 else array)

        ours = jax.tree_util.tree_map_with_path(grad_of, tree)
        optimizer.step()
        updates, state = update(ours, state, tree, frozen=frozen)
        tree = optax.apply_updates(tree, updates)
    return tree


def compare(model, tree, tolerance):
    for name, parameter in model.named_parameters():
        if "lora_" in name or (parameter.requires_grad and "bias" in name):
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            got = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
            want = parameter.detach().numpy()
            ours = got[our_name(name)]
            np.testing.assert_allclose(ours.T if ours.ndim == 2 else ours, want, rtol=0, atol=tolerance, err_msg=name)


def test_steps_of_lora_plus_are_those_of_peft():
    model = torch_model(dora=True)
    tree, frozen = our_tree(model, dora=True)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.1
    )
    tx = optax.with_extra_args_support(optax.chain(optax.adamw(1e-3, weight_decay=0.1), lora_plus(16.0)))
    end = follow(model, optimizer, tx, tree, frozen)
    compare(model, end, 2e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(end, tree)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_of_lora_fa_are_those_of_peft(monkeypatch, decay):
    # PEFT projects in bfloat16 where it can; the formula is what is compared here.
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model = torch_model(bias="lora_only")
    tree, frozen = our_tree(model, dora=False)
    optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=1e-2, weight_decay=decay)
    # PEFT leaves A without a gradient from here on.
    end = follow(model, optimizer, lora_fa(lambda step: 1e-2, weight_decay=decay), tree, frozen)
    compare(model, end, 5e-6)
    distances = [
        np.abs(end["adapters"][m]["kernel"].train["b"] - tree["adapters"][m]["kernel"].train["b"]).max()
        for m in ("first", "second")
    ]
    assert min(distances) > 1e-3


def test_lora_fa_keeps_no_moments_of_a():
    model = torch_model()
    tree, _ = our_tree(model, dora=False)
    sizes = [leaf.size for leaf in jax.tree.leaves(lora_fa(1e-3).init(tree))]
    b_sizes = sum(node.train["b"].size for node in nodes(tree["adapters"]).values())
    assert sum(size for size in sizes if size > 1) == 2 * b_sizes


def test_projection_is_the_closest_step_and_ignores_padding():
    params = {"layers": {"p": {"kernel": jnp.ones((2, IN, OUT))}}}
    _, adapters = sx.attach(jax.random.key(0), params, [("p", sx.LoRA(rank=(2, 4), alpha=8.0))])
    train, frozen = sx.split(adapters)
    (node,), (frozen_node,) = nodes(train).values(), nodes(frozen).values()
    a, scale = node.train["a"], frozen_node.frozen["scale"]
    dense_grad = jax.random.normal(jax.random.key(1), (2, IN, OUT))
    grad_b = scale[:, None, None] * (a.mT @ dense_grad)
    live = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], jnp.float32)[:, :, None]
    grads = jax.tree.map(jnp.ones_like, train)
    grads["layers"]["p"]["kernel"].train["b"] = grad_b * live
    tx = project_lora_fa()
    updates, _ = jax.jit(tx.update)(grads, tx.init(train), train, frozen=frozen)
    (got,) = nodes(updates).values()
    np.testing.assert_array_equal(got.train["a"], 0)
    np.testing.assert_array_equal(got.train["b"][0, 2:], 0)
    for layer, rank in enumerate((2, 4)):
        # The least-squares solution of s a g = dense gradient.
        factor = np.asarray(scale[layer] * a[layer, :, :rank])
        want = np.linalg.lstsq(factor, np.asarray(dense_grad[layer]), rcond=None)[0]
        np.testing.assert_allclose(got.train["b"][layer, :rank], want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_mistakes_are_told():
    with pytest.raises(SboraxError, match="at least 1"):
        lora_plus(0.5)
    tree, frozen = our_tree(torch_model(), dora=False)
    tx = lora_fa(1e-3)
    with pytest.raises(SboraxError, match="frozen="):
        tx.update(tree, tx.init(tree), tree)
    with pytest.raises(SboraxError, match="no scale"):
        tx.update(tree, tx.init(tree), tree, frozen={})


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "lora_rite"},
        {"name": "lora_fa"},
        {"name": "adamw", "b_ratio": 16.0},
        {"name": "lora_rite", "decay": 0.1},
    ],
    ids=str,
)
def test_by_name_in_an_experiment(settings):
    """Each goes downhill on a stack, and is told the scales of the adapters."""
    params = {"layers": {"p": {"kernel": jax.random.normal(jax.random.key(0), (2, IN, OUT))}}}
    _, adapters = sx.attach(jax.random.key(1), params, [("p", sx.LoRA(rank=3, alpha=6.0))])
    train, frozen = sx.split(adapters)
    target = jax.random.normal(jax.random.key(2), (2, IN, OUT))
    tx = make_optimizer(sx.Optimizer(lr=0.01, schedule="constant", warmup=0, **settings), 20)
    state = {"adapters": train, "base": {}}

    def loss(state):
        merged = sx.merge(params, sx.combine(state["adapters"], frozen))
        return 0.01 * jnp.sum((merged["layers"]["p"]["kernel"] - target) ** 2)

    @jax.jit
    def step(state, opt):
        value, grads = jax.value_and_grad(loss)(state)
        updates, opt = tx.update(grads, opt, state, frozen=frozen, base={})
        return optax.apply_updates(state, updates), opt, value

    opt, values = tx.init(state), []
    for _ in range(20):
        state, opt, value = step(state, opt)
        values.append(float(value))
    assert values[-1] < 0.95 * values[0]
    with pytest.raises(SboraxError, match="b_ratio"):
        sx.Optimizer(b_ratio=0.5)


def adapted_stack(method=None):
    """A stack of two kernels with an adapter whose b is not zero, and a target to learn."""
    params = {"layers": {"p": {"kernel": jax.random.normal(jax.random.key(0), (2, IN, OUT))}}}
    _, adapters = sx.attach(jax.random.key(1), params, [("p", method or sx.LoRA(rank=3, alpha=6.0))])
    (node,) = nodes(adapters).values()
    train = jax.tree.map(lambda leaf: leaf + 0.3, node.train)
    return params, {"layers": {"p": {"kernel": sx.Adapter(train, node.frozen, node.method)}}}


@pytest.mark.parametrize(
    "method",
    [sx.LoRA(rank=3, alpha=6.0), sx.DoRA(rank=3), sx.add(sx.LoRA(rank=3), sx.SBoRA(rank=2))],
    ids=str,
)
def test_split_of_lora_fa_holds_a_alone(method):
    _, adapters = adapted_stack(method)
    train, frozen = sx.split_lora_fa(adapters)
    paths = [jax.tree_util.keystr(path, simple=True) for path, _ in jax.tree_util.tree_leaves_with_path(train)]
    assert paths and not [path for path in paths if path.endswith("a")]
    chex.assert_trees_all_equal(sx.combine(train, frozen), adapters)
    chex.assert_trees_all_equal_structs(sx.combine(train, frozen), adapters)
    assert sx.count(train) == sx.count(adapters) - 2 * IN * 3


def test_lora_fa_clips_by_the_gradient_of_b_alone(monkeypatch):
    """Beside PEFT, which freezes A: torch's clipping sees B alone."""
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model = torch_model()
    tree, scales = our_tree(model, dora=False)
    optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=ALPHA, lr=1e-2, weight_decay=0.0)
    adapters = sx.combine(tree["adapters"], scales)
    train, frozen = sx.split_lora_fa(adapters)
    tx = make_optimizer(sx.Optimizer(name="lora_fa", lr=1e-2, clip=0.1, schedule="constant", warmup=0), 10)
    state = tx.init(train)
    for x, y in batches():
        optimizer.zero_grad()
        torch_loss(model, x, y).backward()
        named = {our_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        grads = jax.tree_util.tree_map_with_path(
            lambda path, leaf, named=named: jnp.asarray(
                named["adapters/" + jax.tree_util.keystr(path, simple=True, separator="/")].numpy().T
            ),
            train,
        )
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer.step()
        updates, state = tx.update(grads, state, train, frozen=frozen)
        train = optax.apply_updates(train, updates)
    compare(model, {"adapters": sx.combine(train, frozen), "base": {}}, 5e-6)


def test_lora_fa_refuses_adapters_without_a_pair():
    _, adapters = adapted_stack(sx.Bone(rank=3))
    with pytest.raises(SboraxError, match="no adapter has a pair"):
        sx.split_lora_fa(adapters)
    with pytest.raises(SboraxError, match="VeLoRA approximates the gradient of a, which is fixed here"):
        sx.split_lora_fa(adapted_stack(sx.VeLoRA(rank=3, groups=4))[1])
    train, frozen = sx.split(adapters)
    tx = lora_fa(1e-3)
    with pytest.raises(SboraxError, match="no adapter has a pair"):
        tx.update(train, tx.init(train), train, frozen=frozen)


@pytest.mark.parametrize(
    "method",
    [sx.AdaLoRA(rank=3), sx.KaSA(rank=3), sx.OSF(kept=0.5), sx.add(sx.LoRA(rank=3), sx.AdaLoRA(rank=3))],
    ids=str,
)
def test_lora_fa_refuses_trained_gains_between_a_and_b(method):
    _, adapters = adapted_stack(method)
    with pytest.raises(SboraxError, match="trains e between a and b"):
        sx.split_lora_fa(adapters)


def test_lora_fa_refuses_factors_with_masks():
    _, adapters = adapted_stack(sx.PRILoRA(rank=3, persistent_mask=True))
    with pytest.raises(SboraxError, match="PRILoRA masks a, which the projection of b leaves out"):
        sx.split_lora_fa(adapters)


@pytest.mark.parametrize(
    "method",
    [sx.HiRA(rank=3), sx.GLoRA(rank=3), sx.DeLoRA(rank=3), sx.LoKr(rank=1)],
    ids=lambda m: type(m).__name__,
)
def test_lora_fa_refuses_other_changes_than_a_product(method):
    _, adapters = adapted_stack(method)
    refusal = f"the change by {type(method).__name__} is not s a b"
    with pytest.raises(SboraxError, match=refusal):
        sx.split_lora_fa(adapters)
    train, frozen = sx.split(adapters)
    tx = lora_fa(1e-3)
    with pytest.raises(SboraxError, match=refusal):
        tx.update(train, tx.init(train), train, frozen=frozen)
