"""ResLoRA's two approximate merges of the input and middle shortcuts, arXiv:2402.18039.

Both put a plain LoRA in the place of every such adapter, as if the earlier layer's values were a multiple of the
layer's own: x_{n-k} = alpha_{n-k} x_n. That LoRA merges, and is exported, exactly; the error lies in the assumption.
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
    """Merged `params`, and `adapters` that are the same on the old ones.

    error: ||merged - adapted|| / ||adapted|| over the outputs. moved: ||base - adapted|| / ||adapted||, what leaving
    the adapters out would cost: a merge is of use where `error` is well below it.
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


def _merged(params: Params, adapters: Adapters, plainly: Adapters, outputs: Outputs) -> Merged:
    merged = merge(params, plainly)
    base, adapted, ours = outputs(params, None), outputs(params, adapters), outputs(merged, None)
    size = jnp.linalg.norm(adapted.reshape(-1))
    error, moved = (float(jnp.linalg.norm((other - adapted).reshape(-1)) / size) for other in (ours, base))
    return Merged(merged, plainly, error, moved)


def by_inputs(adapters: Adapters, norms: Sequence[Mapping[str, Any]]) -> Adapters:
    """Plain LoRA for every input and middle shortcut, by the sizes of what the layers saw.

    alpha_{n-k} = f_{n-k} / f_n, f the mean over batches of ||x||_F ("input") or ||x a||_F ("middle");
    "input": W*_n = W_n + (1 + alpha_{n-1}) s a_n b_n, with alpha 1 in the first layer of a chain;
    "middle": W*_n = W_n + (1 + sum_k alpha_{n-k}) s a_n b_n.

    norms: what `LanguageModel.collect` remembers of each batch, without padding (authors: the last 100 of training).
    Raises SboraxError if there are none, none for one of the adapters, or a size of zero to divide by.
    """
    if not norms:
        raise SboraxError("by_inputs needs the norms of at least one batch: see LanguageModel.collect")

    def one(node: Adapter, earlier: tuple[int, ...], seen: Any) -> Adapter:
        method = node.method
        assert isinstance(method, ResLoRA)
        if not method.no_merge:
            return node
        name, width = ("input", None) if method.shortcut == "input" else ("hidden", method.rank)
        if name not in seen:
            raise SboraxError("by_inputs: an adapter has no norms; collect them with these same adapters")
        # The layer's own x a comes first in what it remembers.
        f = jnp.mean(jnp.linalg.norm(seen[name][..., :width], axis=-1), axis=-1)
        sums = [sum(_alphas(method, reach, lambda k, n=n: f[n - k] / f[n])) for n, reach in enumerate(earlier)]
        factors = jnp.stack([jnp.asarray(1.0 + each, f.dtype) for each in sums])
        if not jnp.isfinite(factors).all():
            raise SboraxError("by_inputs: a layer saw nothing but zeros, which have no size to divide by")
        scale = node.frozen["scale"] * factors
        return lora_of(scale[:, None, None] * node.train["a"], node.train["b"], node)

    seen = {
        path: jax.tree.map(lambda *leaves: jnp.stack(leaves, -2), *(batch[path] for batch in norms))
        for path in norms[0]
    }
    return nest(over_chains(nodes(adapters), one, seen))


def by_weights(params: Params, adapters: Adapters) -> Adapters:
    """Plain LoRA for every input and middle shortcut, by the sizes of the weights: no data needed.

    alpha_{n-k} = f_{n-k-1} / f_{n-1}, f_j = ||W*_j||_F, since x_j comes from layer j - 1; 1 where the chain has no
    layer n-k-1, so in its first two layers;
    "input": W*_n = W_n + (1 + alpha_{n-1}) s a_n b_n; "middle": a*_n = a_n + sum_k alpha_{n-k} a_{n-k}, then as LoRA.
    """

    def one(node: Adapter, earlier: tuple[int, ...], seen: Any) -> Adapter:
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
            others = [a[n] if method.shortcut == "input" else a[n - k] for k in range(1, len(alphas) + 1)]
            merged.append(a[n] + sum(alpha * other for alpha, other in zip(alphas, others, strict=True)))
            weight = (
                dense(jax.tree.map(lambda leaf, n=n: leaf[n], seen["kernel"])).astype(a.dtype).reshape(a.shape[1], -1)
            )
            sizes.append(jnp.linalg.norm(weight + pair_weight(merged[n], b[n], scale[n])))
        return lora_of(scale[:, None, None] * jnp.stack(merged), b, node)

    found = kernels(params)
    return nest(over_chains(nodes(adapters), one, {path: {"kernel": leaf} for path, leaf in found.items()}))


def _alphas(method: ResLoRA, reach: int, ratio: Callable[[int], Any]) -> list[Any]:
    """alpha_{n-1}, alpha_{n-2}, ... of one layer with `reach` layers of its chain before it."""
    if method.shortcut == "input":
        return [ratio(1) if reach else 1.0]
    return [ratio(k) for k in range(1, 1 + (reach if method.pre_num == -1 else min(reach, method.pre_num)))]
