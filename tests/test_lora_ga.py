"""LoRA-GA against the authors' arrays and against PEFT; hints as averages of gradients."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, LoraGAConfig

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.models.nf4 import quantise

pytestmark = pytest.mark.usefixtures("strict")

GOLDEN = np.load(Path(__file__).parent / "golden" / "lora_ga.npz")
W, G = GOLDEN["W"].T, GOLDEN["G"].T
NAMES = [f"rs_{d}_{s}" for d in ("ArB2r", "A2rBr", "ArBr") for s in ("stable", "unit", "gd", "weightS")]
NAMES += [f"std_ArB2r_{s}" for s in ("stable", "unit", "gd", "weightS")]
EXTRA = {"rs_ArB2r_stable64": {"gamma": 64.0}}


def attached(method, weight=W, grad=G):
    params = {"proj": {"kernel": jnp.asarray(weight)}}
    hints = {"proj": sx.Hint(grad=np.asarray(grad))}
    params, adapters = sx.attach(jax.random.key(0), params, [("proj", method)], hints)
    return params["proj"]["kernel"], adapters["proj"]["kernel"]


def method_of(name, **changes):
    kind, direction, scale = name.split("_")[:3]
    return sx.LoRAGA(
        rank=3, alpha=16.0, rslora=kind == "rs", direction=direction, scale=scale.rstrip("0123456789"), **changes
    )


def close(got, want, tol=2e-6):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=0, atol=tol * np.abs(np.asarray(want)).max())


@pytest.mark.parametrize("name", [*NAMES, *EXTRA])
def test_equals_the_authors_initialisation(name):
    residual, node = attached(method_of(name, **EXTRA.get(name, {})))
    a, b, s = (np.asarray(leaf, np.float64) for leaf in (node.train["a"], node.train["b"], node.frozen["scale"]))
    theirs_a, theirs_b = GOLDEN[f"{name}__A"].astype(np.float64).T, GOLDEN[f"{name}__B"].astype(np.float64).T
    close(s, GOLDEN[f"{name[: name.index('_')]}_scaling"], 1e-6)
    # What no sign of a singular vector changes.
    close(a @ a.T, theirs_a @ theirs_a.T)
    close(b.T @ b, theirs_b.T @ theirs_b)
    if name not in EXTRA:
        close(a @ a.T, GOLDEN[f"{name}__AtA"])
        close(b.T @ b, GOLDEN[f"{name}__BBt"])
    close(a @ a.T @ G + G @ b.T @ b, theirs_a @ theirs_a.T @ G + G @ theirs_b.T @ theirs_b)
    close(residual + s * a @ b, W)
    # The rest, with the signs of the authors' run.
    sign_a, sign_b = np.sign(np.sum(a * theirs_a, axis=0)), np.sign(np.sum(b * theirs_b, axis=1))
    a, b = a * sign_a, b * sign_b[:, None]
    close(a, theirs_a, 2e-5)
    close(b, theirs_b, 2e-5)
    close(W - s * a @ b, GOLDEN[f"{name}__W_new"].T, 2e-5)


def test_norm_clip_equals_the_authors():
    """How much is clipped depends on the signs: the loose factors, given the authors' signs, clip to theirs."""
    clipped, loose = (attached(sx.LoRAGA(rank=3, gamma=1.0, norm_clip=clip))[1] for clip in (True, False))
    offset = [np.abs(n.frozen["scale"] * n.train["a"] @ n.train["b"]).max() for n in (clipped, loose)]
    assert offset[1] > np.abs(W).max()
    np.testing.assert_allclose(offset[0], np.abs(W).max(), rtol=1e-5)
    theirs_a, theirs_b = (GOLDEN[f"rs_ArB2r_stable1_normclip__{name}"].T for name in "AB")
    a, b = np.asarray(loose.train["a"]), np.asarray(loose.train["b"])
    a = a * np.sign(np.sum(a * theirs_a, axis=0))
    b = b * np.sign(np.sum(b * theirs_b, axis=1))[:, None]
    root = np.sqrt(np.abs(W).max() / np.abs(loose.frozen["scale"] * a @ b).max())
    close(root * a, theirs_a, 2e-5)
    close(root * b, theirs_b, 2e-5)


def test_first_step_follows_the_best_rank_2r_gradient():
    """W' = W - eta s^2 sqrt(out) / gamma G_2r, the paper's identity, to first order in eta."""
    residual, node = attached(sx.LoRAGA(rank=3, gamma=16.0))

    def loss(train):
        return jnp.sum(jnp.asarray(G) * node.method.merge(residual, sx.Adapter(train, node.frozen, node.method)))

    grads = jax.grad(loss)(node.train)
    s = float(node.frozen["scale"])
    change = s * (grads["a"] @ node.train["b"] + node.train["a"] @ grads["b"])
    u, sigma, vt = np.linalg.svd(G.astype(np.float64))
    best = (u[:, :6] * sigma[:6]) @ vt[:6]
    close(change, s**2 * np.sqrt(17) / 16 * best, 1e-5)


def test_change_of_the_original_base_is_exact_at_twice_the_rank():
    residual, node = attached(sx.LoRAGA(rank=3))
    train = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), node.train)
    node = sx.Adapter(train, node.frozen, node.method)
    a, b = node.method.factors(node, W.shape)
    assert a.shape == (23, 6) and b.shape == (6, 17)
    close(W + a @ b, node.method.merge(residual, node), 1e-5)


def test_zero_gradient_starts_like_lora():
    residual, node = attached(sx.LoRAGA(rank=3), grad=np.zeros_like(G))
    chex.assert_trees_all_equal(residual, jnp.asarray(W))
    assert not node.train["b"].any() and node.train["a"].all()
    assert float(jnp.abs(node.train["a"]).max()) <= 23**-0.5


def test_subspace_iterations_find_the_same_directions():
    exact, fast = (attached(sx.LoRAGA(rank=3, niter=n))[1].train for n in (None, 4))
    close(fast["a"] @ fast["a"].T, exact["a"] @ exact["a"].T, 1e-4)
    close(fast["b"].T @ fast["b"], exact["b"].T @ exact["b"], 1e-4)


@pytest.mark.parametrize("formula", ["authors", "peft"])
def test_random_direction_takes_r_distinct_pairs(formula):
    """The authors deal all 2r of them out to a and b; PEFT gives both the same."""
    _, node = attached(sx.LoRAGA(rank=3, direction="random", scale="unit", formula=formula))
    u, _, vt = np.linalg.svd(G.astype(np.float64))
    taken = []
    for factor, directions in ((np.asarray(node.train["a"]).T, u[:, :6]), (np.asarray(node.train["b"]), vt[:6].T)):
        share = np.square(factor / np.linalg.norm(factor, axis=1, keepdims=True) @ directions)
        np.testing.assert_allclose(np.sort(share, axis=1)[:, -1], 1.0, atol=1e-4)
        taken.append(list(share.argmax(axis=1)))
    of_a, of_b = taken
    assert len(set(of_a)) == 3
    assert set(of_a) | set(of_b) == set(range(6)) if formula == "authors" else of_a == of_b


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize(
    ("scale", "theirs"), [("stable", "stable"), ("gd", "gd_scale"), ("weightS", "weight_svd"), ("unit", "unit")]
)
def test_peft_formula_equals_peft(direction, scale, theirs, monkeypatch):
    def exact(matrix, q, niter):
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        return u[:, :q].float(), s[:q].float(), vt[:q].T.float()

    # PEFT's is randomised, and off by 1e-3 on a flat spectrum.
    monkeypatch.setattr(torch, "svd_lowrank", exact)
    model = torch.nn.Sequential(torch.nn.Linear(23, 17, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(GOLDEN["W"]))
    model[0]._peft_loraga_grad = torch.tensor(GOLDEN["G"])
    config = LoraConfig(
        r=3,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["0"],
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=theirs, stable_gamma=16),
    )
    layer = peft.get_peft_model(model, config).base_model.model[0]
    theirs_a, theirs_b = (half["default"].weight.detach().numpy().T for half in (layer.lora_A, layer.lora_B))
    residual, node = attached(sx.LoRAGA(rank=3, alpha=16.0, direction=direction, scale=scale, formula="peft"))
    a, b = np.asarray(node.train["a"]), np.asarray(node.train["b"])
    close(a @ a.T, theirs_a @ theirs_a.T, 1e-5)
    close(b.T @ b, theirs_b.T @ theirs_b, 1e-5)
    sign_a, sign_b = np.sign(np.sum(a * theirs_a, axis=0)), np.sign(np.sum(b * theirs_b, axis=1))
    close(node.frozen["scale"], layer.scaling["default"])
    close(W - layer.scaling["default"] * (a * sign_a) @ (b * sign_b[:, None]), layer.base_layer.weight.detach().T, 1e-5)
    close(residual + node.frozen["scale"] * a @ b, W)


def test_mistakes_are_told_at_planning():
    params = {"proj": {"kernel": jnp.asarray(W)}}
    with pytest.raises(sx.SboraxError, match="needs hint 'grad'"):
        sx.plan(params, [("proj", sx.LoRAGA(rank=3))])
    with pytest.raises(sx.SboraxError, match=r"gradient has shape \(17, 23\), the kernel \(23, 17\)"):
        sx.plan(params, [("proj", sx.LoRAGA(rank=3))], hints={"proj": sx.Hint(grad=jnp.asarray(G.T))})
    with pytest.raises(sx.SboraxError, match="half the smaller side"):
        sx.plan(params, [("proj", sx.LoRAGA(rank=9))], hints={"proj": sx.Hint(grad=jnp.asarray(G))})
    unknown = sx.LoRAGA(rank=3)
    # Not through the constructor: the tests check annotations there.
    object.__setattr__(unknown, "scale", "other")
    with pytest.raises(sx.SboraxError, match="direction, scale and formula"):
        unknown.check(W.shape)


STACK = jax.random.normal(jax.random.key(3), (2, 8, 8))
BATCHES = [jax.random.normal(jax.random.key(i), (3, 8)) for i in (4, 5)]


def stacked_loss(params, x):
    def layer(x, weight):
        return jnp.tanh(sx.linear(x, weight)), None

    return jnp.sum(jnp.square(jax.lax.scan(layer, x, params["layers"]["proj"]["kernel"])[0] @ params["head"]["kernel"]))


def flat_loss(params, x):
    for i in range(2):
        x = jnp.tanh(sx.linear(x, params["layers"][str(i)]["proj"]["kernel"]))
    return jnp.sum(jnp.square(x @ params["head"]["kernel"]))


def test_hints_are_mean_gradients_stacked_and_flat():
    stacked = {"layers": {"proj": {"kernel": STACK}}, "head": {"kernel": STACK[0]}}
    flat = {"layers": {str(i): {"proj": {"kernel": STACK[i]}} for i in range(2)}, "head": {"kernel": STACK[0]}}
    grads = [jax.grad(stacked_loss)(stacked, x)["layers"]["proj"]["kernel"] for x in BATCHES]
    want = (grads[0] + grads[1]) / 2
    hints = sx.gradient_hints(stacked_loss, stacked, "proj", iter(BATCHES))
    assert list(hints) == ["layers/proj"]
    close(hints["layers/proj"].grad, want, 1e-5)
    apart = sx.gradient_hints(flat_loss, flat, ["proj"], BATCHES)
    assert sorted(apart) == ["layers/0/proj", "layers/1/proj"]
    for i in range(2):
        close(apart[f"layers/{i}/proj"].grad, want[i], 1e-5)
    rules = [("proj", sx.LoRAGA(rank=2))]
    residual, adapters = sx.attach(jax.random.key(0), stacked, rules, hints)
    apart_residual, flat_adapters = sx.attach(jax.random.key(0), flat, rules, apart)
    assert len(nodes(flat_adapters)) == 2
    node = adapters["layers"]["proj"]["kernel"]
    for i in range(2):
        layer = flat_adapters["layers"][str(i)]["proj"]["kernel"]
        close(layer.train["a"] @ layer.train["a"].T, node.train["a"][i] @ node.train["a"][i].T, 1e-3)
        merged = layer.method.merge(apart_residual["layers"][str(i)]["proj"]["kernel"], layer)
        close(merged, STACK[i], 1e-5)
    x = BATCHES[0]
    close(stacked_loss(sx.merge(residual, adapters), x), stacked_loss(stacked, x), 1e-5)


def test_hints_of_a_quantised_kernel_are_those_of_its_dense_value():
    weight = jax.random.normal(jax.random.key(6), (64, 8))
    x = jax.random.normal(jax.random.key(7), (3, 64))

    def loss(params, x):
        return jnp.sum(jnp.tanh(sx.linear(x, params["proj"]["kernel"])))

    packed = quantise(weight)
    (hint,) = sx.gradient_hints(loss, {"proj": {"kernel": packed}}, "proj", [x]).values()
    close(hint.grad, jax.grad(loss)({"proj": {"kernel": packed.dense()}}, x)["proj"]["kernel"], 1e-5)


def test_hints_refuse_what_they_cannot_do():
    params = {"proj": {"kernel": jnp.ones((2, 2))}}

    def loss(params, x):
        return jnp.sum(jnp.log(params["proj"]["kernel"] - 1.0) * x)

    with pytest.raises(sx.SboraxError, match=r"no kernel matches \['other'\]; the kernels are proj/kernel"):
        sx.gradient_hints(loss, params, "other", [jnp.float32(1.0)])
    with pytest.raises(sx.SboraxError, match="at least one batch"):
        sx.gradient_hints(loss, params, "proj", [])
    with pytest.raises(sx.SboraxError, match="proj/kernel: its gradient is not finite"):
        sx.gradient_hints(loss, params, "proj", [jnp.float32(1.0)])
