"""MonteCLoRA beside PEFT: equal draws give equal steps, its draws have the right distribution, and its penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from scipy import stats
from torch_pair import TOKENS, build, equal_noise, with_peft

import sborax as sx
from sborax.adapters.tree import nodes
from sborax.interop.peft import load_peft
from sborax.methods.monteclora import proportions, variances
from sborax.train.monteclora_loss import monteclora_penalty
from sborax.train.outputs import Outputs

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = {"num_samples": 4, "sample_scaler": 0.3, "kl_loss_weight": 0.02, "dirichlet_prior": 0.4, "use_entropy": True}
LOSS = sx.MonteCLoRALoss(kl_weight=0.02, entropy=True, prior=0.4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return build(tmp_path_factory.mktemp("base"))


def outputs_of(pair, params, adapters, key):
    tokens, targets = jnp.asarray(TOKENS[:, :-1]), jnp.asarray(TOKENS[:, 1:])
    batch = {"targets": targets, "counts": jnp.ones(targets.shape, bool)}
    hidden = pair.ours.hidden(params, adapters, tokens, dropout_key=key)
    return Outputs(hidden, batch, pair.ours, params, adapters, key=key)


def test_equal_draws_give_the_loss_and_the_gradients_of_peft(pair, tmp_path, monkeypatch):
    equal_noise(monkeypatch)
    sampler = peft.MontecloraConfig(**SETTINGS, buffer_size=1)
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], monteclora_config=sampler)
    theirs = with_peft(pair, config).train()
    theirs.save_pretrained(tmp_path / "adapter")
    tokens = torch.tensor(TOKENS, dtype=torch.long)
    with torch.no_grad():
        quiet = theirs.eval()(tokens, labels=tokens).loss.item()
    plain = theirs.train()(tokens, labels=tokens).loss
    penalty = theirs.base_model._get_monteclora_loss()
    (plain + penalty).backward()
    assert abs(plain.item() - quiet) > 1e-3, "the noise changes nothing: the comparison proves nothing"

    params, adapters = load_peft(tmp_path / "adapter", pair.ours)
    train, frozen = sx.split(adapters)

    def mean(train):
        total, items = LOSS(outputs_of(pair, params, sx.combine(train, frozen), jax.random.key(0)))
        return total / items

    loss, grads = jax.jit(jax.value_and_grad(mean))(train)
    np.testing.assert_allclose(loss, (plain + penalty).item(), rtol=1e-5)
    np.testing.assert_allclose(
        monteclora_penalty(adapters, jax.random.key(0), 0.02, True, 0.4), penalty.item(), rtol=1e-5
    )
    # PEFT's gradients through its files.
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.grad
    theirs.save_pretrained(tmp_path / "gradients")
    expected = nodes(load_peft(tmp_path / "gradients", pair.ours)[1])
    for path, node in nodes(grads).items():
        for name, leaf in node.train.items():
            assert np.abs(leaf).max() > 1e-4
            np.testing.assert_allclose(leaf, expected[path].train[name], rtol=1e-4, atol=1e-5, err_msg=f"{path} {name}")


def test_held_out_losses_are_without_noise_and_penalty(pair):
    params, adapters = sx.attach(jax.random.key(0), pair.ours.params, [("q_proj", sx.MonteCLoRA(rank=3, noise=1.0))])
    outputs = outputs_of(pair, params, adapters, None)
    assert LOSS.by_token(outputs)[0] == LOSS(outputs)[0] == sx.CrossEntropy()(outputs)[0]
    with pytest.raises(sx.SboraxError, match="MonteCLoRALoss: no kernel has MonteCLoRA"):
        monteclora_penalty({}, jax.random.key(0), 1.0, True, 1.0)


def test_penalties_are_of_every_layer_that_has_monteclora(pair):
    """In rules for some layers, and in methods made of it, and not of layers without it."""
    method = sx.MonteCLoRA(rank=3, samples=4)
    rules = [sx.Rule("q_proj", method, layers=(1,)), ("v_proj", sx.Activated(sx.scale(method, 0.5), (3,)))]
    train, _ = sx.split(sx.attach(jax.random.key(0), pair.ours.params, rules)[1])

    def slopes(half):
        penalty = jax.grad(lambda half: monteclora_penalty(half, jax.random.key(0), 0.02, False, 0.4))
        return {path.split("/")[-2]: node.train for path, node in nodes(penalty(half)).items()}

    of_tree, halves = slopes(train), {path.split("/")[-2]: node.train for path, node in nodes(train).items()}
    leaves, got = (tree["v_proj"]["part"]["part"] for tree in (halves, of_tree))
    for layer in (0, 1):
        single = {"x/kernel": sx.Adapter({name: leaf[layer] for name, leaf in leaves.items()}, {}, method)}
        # What depends on g is not drawn; the mean is over three weights.
        np.testing.assert_allclose(got["g"][layer], slopes(single)["x"]["g"] / 3, rtol=1e-5)
    for name in ("d", "g"):
        idle, acting = of_tree["q_proj"]["0"][name]
        assert np.abs(idle).max() == 0 < np.abs(acting).max()


def test_draws_have_the_distributions_of_the_paper():
    """Variances are those of a Wishart matrix's diagonal, and logits of proportions are normal."""
    d, g = jnp.asarray([0.3, -0.2, 0.1]), jnp.asarray([0.5, -0.1, 0.2, 0.4])
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda key: variances(key, d))(keys)
    reference = torch.distributions.Wishart(torch.tensor(3.0), scale_tril=torch.eye(3))
    torch.manual_seed(0)
    wishart = reference._bartlett_sampling(torch.Size((4000,))).diagonal(dim1=1, dim2=2).numpy()
    for column in range(3):
        ours = np.asarray(draws[:, column] / jnp.exp(2 * d[column]))
        assert stats.ks_2samp(ours, wishart[:, column]).pvalue > 0.01
    np.testing.assert_allclose(np.corrcoef(np.asarray(draws).T), np.eye(3), atol=0.06)
    logits = np.log(jax.vmap(lambda key: proportions(key, g))(keys))
    inverse = np.exp(-np.asarray(g))
    deviations = np.sqrt(inverse * (1 - 2 / 4) + inverse.sum() / 16)
    centre = np.asarray(g) - np.asarray(g).mean()
    # A softmax leaves differences of logits alone.
    apart = logits[:, 1:] - logits[:, :1]
    np.testing.assert_allclose(apart.mean(0), centre[1:] - centre[0], atol=0.08)
    np.testing.assert_allclose(apart.std(0), np.hypot(deviations[1:], deviations[0]), rtol=0.05)
