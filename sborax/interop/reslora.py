"""ResLoRA's two approximate merges of the input and middle shortcuts, arXiv:2402.18039.

Both replace every such adapter by a plain LoRA, on the assumption that an earlier layer's values are a multiple of the
layer's: x_{n-k} = alpha_{n-k} x_n. The assumption is the only error: the LoRA merges and is exported exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sborax.adapters.core import Adapter, SboraxError, dense
from sborax.adapters.depth import over_chains
from sborax.adapters.leaves import nest
from sborax.adapters.paths import kernels
from sborax.adapters.tree import Adapters, Params, merge, nodes
from sborax.methods.lora import lora_of
from sborax.methods.lowrank import pair_weight
from sborax.methods.reslora import ResLoRA

Outputs = Callable[[Params, Adapters | None], Float[Array, "..."]]
"""The model's outputs on some data, such as `lambda params, adapters: model.hidden(params, adapters, tokens)`."""


class Merged(NamedTuple):
    """An approximate merge.

    - params: the merged parameters.
    - adapters: plain LoRA adapters with the same function on the original parameters.
    - error: ||merged - adapted|| / ||adapted|| over the outputs.
    - moved: ||base - adapted|| / ||adapted||, the error of leaving the adapters out. A merge is useful if `error` is
      well below it.
    """

    params: Params
    adapters: Adapters
    error: float
    moved: float

    def __str__(self) -> str:
        return (
            f"merged approximately: relative error of the outputs {self.error:.3g}; without adapters {self.moved:.3g}"
        )


def merge_by_inputs(params: Params, adapters: Adapters, norms: Sequence[Mapping[str, Any]], outputs: Outputs) -> Merged:
    """`by_inputs` merged into `params`, with its error on `outputs`."""
    return _merged(params, adapters, by_inputs(adapters, norms), outputs)


def merge_by_weights(params: Params, adapters: Adapters, outputs: Outputs) -> Merged:
    """`by_weights` merged into `params`, with its error on `outputs`."""
    return _merged(params, adapters, by_weights(params, adapters), outputs)


def _merged(params: Params, adapters: Adapters, plain: Adapters, outputs: Outputs) -> Merged:
    """The merge of `plain`, LoRA adapters in place of `adapters`, with its error."""
    merged = merge(params, plain)
    initial, adapted, final = outputs(params, None), outputs(params, adapters), outputs(merged, None)
    norm = jnp.linalg.norm(adapted.reshape(-1))
    error, change = (float(jnp.linalg.norm((result - adapted).reshape(-1)) / norm) for result in (final, initial))
    return Merged(merged, plain, error, change)


def by_inputs(adapters: Adapters, norms: Sequence[Mapping[str, Any]]) -> Adapters:
    """Plain LoRA for every input and middle shortcut, with alphas from the norms of the layers' inputs.

    alpha_{n-k} = f_{n-k} / f_n, f the mean over batches of ||x||_F ("input") or ||x a||_F ("middle");
    "input": W*_n = W_n + (1 + alpha_{n-1}) s a_n b_n, with alpha 1 in the first layer of a chain;
    "middle": W*_n = W_n + (1 + sum_k alpha_{n-k}) s a_n b_n.

    Args:
    - adapters: the trained adapters.
    - norms: what `LanguageModel.collect` remembers, one entry a batch, without padding. The authors take the last 100
      batches of training.

    Raises SboraxError for no batches, for an adapter without norms, and for a norm of zero.
    """
    if not norms:
        raise SboraxError("by_inputs needs the norms of at least one batch: see LanguageModel.collect")

    def plain_lora(node: Adapter, earlier: tuple[int, ...], collected: Any) -> Adapter:
        method = node.method
        assert isinstance(method, ResLoRA)
        if not method.no_merge:
            return node
        name, width = ("input", None) if method.shortcut == "input" else ("hidden", method.rank)
        if name not in collected:
            raise SboraxError("by_inputs: an adapter has no norms; collect them with these same adapters")
        # The layer's x a comes first in what it remembers.
        f = jnp.mean(jnp.linalg.norm(collected[name][..., :width], axis=-1), axis=-1)
        sums = [sum(_alphas(method, reach, lambda k, n=n: f[n - k] / f[n])) for n, reach in enumerate(earlier)]
        factors = jnp.stack([jnp.asarray(1.0 + total, f.dtype) for total in sums])
        if not jnp.isfinite(factors).all():
            raise SboraxError("by_inputs: a layer saw nothing but zeros, which have no size to divide by")
        scale = node.frozen["scale"] * factors
        return lora_of(scale[:, None, None] * node.train["a"], node.train["b"], node)

    stacked = {
        path: jax.tree.map(lambda *leaves: jnp.stack(leaves, -2), *(batch[path] for batch in norms))
        for path in norms[0]
    }
    return nest(over_chains(nodes(adapters), plain_lora, stacked))


def by_weights(params: Params, adapters: Adapters) -> Adapters:
    """Plain LoRA for every input and middle shortcut, with alphas from the norms of the weights. Needs no data.

    alpha_{n-k} = f_{n-k-1} / f_{n-1}, f_j = ||W*_j||_F, since x_j comes from layer j - 1; 1 if the chain has no layer
    n-k-1, as in its first two layers;
    "input": W*_n = W_n + (1 + alpha_{n-1}) s a_n b_n; "middle": a*_n = a_n + sum_k alpha_{n-k} a_{n-k}, then as LoRA.
    """

    def plain_lora(node: Adapter, earlier: tuple[int, ...], base: Any) -> Adapter:
        method, a, b, scale = node.method, node.train["a"], node.train["b"], node.frozen["scale"]
        assert isinstance(method, ResLoRA)
        if not method.no_merge:
            return node
        sizes: list[Array] = []
        merged: list[Array] = []
        for n, reach in enumerate(earlier):

            def ratio(k: int, n: int = n, reach: int = reach) -> Array | float:
                return sizes[n - k - 1] / sizes[n - 1] if reach > k else 1.0

            alphas = _alphas(method, reach, ratio)
            shortcuts = [a[n] if method.shortcut == "input" else a[n - k] for k in range(1, len(alphas) + 1)]
            merged.append(a[n] + sum(alpha * shortcut for alpha, shortcut in zip(alphas, shortcuts, strict=True)))
            kernel = dense(jax.tree.map(lambda leaf, n=n: leaf[n], base["kernel"]))
            weight = kernel.astype(a.dtype).reshape(a.shape[1], -1)
            sizes.append(jnp.linalg.norm(weight + pair_weight(merged[n], b[n], scale[n])))
        return lora_of(scale[:, None, None] * jnp.stack(merged), b, node)

    base = {path: {"kernel": leaf} for path, leaf in kernels(params).items()}
    return nest(over_chains(nodes(adapters), plain_lora, base))


def _alphas(method: ResLoRA, reach: int, ratio: Callable[[int], Any]) -> list[Any]:
    """`[alpha_{n-1}, alpha_{n-2}, ...]` of a layer that `reach` layers of its chain precede."""
    if method.shortcut == "input":
        return [ratio(1) if reach else 1.0]
    return [ratio(k) for k in range(1, 1 + (reach if method.pre_num == -1 else min(reach, method.pre_num)))]
