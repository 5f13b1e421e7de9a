"""LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, arXiv:2305.18403."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from sborax.adapters.bank import banked_parts
from sborax.adapters.core import AbstractAdditive, AbstractFactored, AbstractWeight, Adapter, SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Site
from sborax.adapters.tree import nodes
from sborax.methods.masked import Masked
from sborax.procedures.criteria import CRITERIA
from sborax.procedures.importance import BLOCKS, LoRAPruneState, block_of, watch_importance
from sborax.procedures.in_place import AbstractInPlace, check_layers, find_state, replace_state
from sborax.procedures.procedure import Boundary, Run


@dataclasses.dataclass(frozen=True)
class LoRAPrune(AbstractInPlace):
    """Prune heads and MLP channels while LoRA trains; importance |G * (W + s a b)|, G from LoRA's gradients.

    Groups: key-value heads with all query heads that read them (q, k, v, o), and hidden channels (gate, up, down). In
    each layer the share of pruned groups follows `sparsity`, cubic in time; pruned groups stay pruned.

    - ratio: share pruned in the end (authors: 0.5).
    - initial: share pruned at first.
    - warmup, cooldown: fractions of the run before and after the pruning (authors: 0.1).
    - every: steps between two prunings (authors: 10); one more brings the share to `ratio` exactly.
    - decay: of the running scores (authors: 0.9).
    - power: 1 as in the authors' code, 2 as in the paper.
    - metric: "lora"; or to compare with it "grad", where G = dL/dW of the base weight itself, and "magnitude", where
        G = 1, both in the authors' code; or "random", another order at every pruning.
    - protect: fraction of the layers, counted from the first, that are never pruned; above 0 the last layer is spared
        too (authors: 0.1). With 0 all layers shrink alike and transformers loads the result.

    All seven projections of a layer are adapted, for "lora" by methods whose change is s a b (`pair`), such as
    LoRA, for "grad" by additive ones, for the other metrics by any that merge. The model has no biases.

    "grad" costs what "lora" is there to save: every step holds the gradients of all adapted kernels at once, as large
    as these and in their precision (13 GB for LLaMA-7B in bfloat16). Its base is not quantised.
    """

    paper = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning, arXiv:2305.18403"

    ratio: float = 0.5
    initial: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    every: int = 10
    decay: float = 0.9
    power: Literal[1, 2] = 1
    metric: Literal["lora", "magnitude", "random", "grad"] = "lora"
    protect: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.initial <= self.ratio < 1.0:
            raise SboraxError(f"LoRAPrune: needs 0 <= initial <= ratio < 1, got {self.initial} and {self.ratio}")
        if not (self.warmup >= 0.0 and self.cooldown >= 0.0 and self.warmup + self.cooldown <= 1.0):
            raise SboraxError(f"LoRAPrune: warmup {self.warmup} and cooldown {self.cooldown} do not fit into one run")
        if self.every < 1 or not 0.0 <= self.decay < 1.0 or not 0.0 <= self.protect < 1.0:
            raise SboraxError("LoRAPrune: needs every >= 1, decay and protect in [0, 1)")

    def check(self, run: Run, base: dict[str, Any]) -> None:
        check_layers(self, run)
        sites: dict[str, dict[str, Site]] = {}
        for path, site in _sites(run).items():
            parent, _, module = block_of(path)
            sites.setdefault(parent, {})[module] = site
            name, pair = type(site.method).__name__, isinstance(site.method, AbstractFactored) and site.method.pair
            if banked_parts(site.method):
                raise SboraxError(f"LoRAPrune: {path}: {name} shares what it trains with other kernels; use LoRA")
            if site.method.no_merge or site.method.linked:
                raise SboraxError(f"LoRAPrune: {path}: {name} does not merge layer by layer; use LoRA")
            if CRITERIA[self.metric].full and not isinstance(site.method, AbstractAdditive):
                raise SboraxError(
                    f"LoRAPrune: {path}: {name} does not add to the weight, so the merged weight has another gradient "
                    "than the base; use LoRA, or metric='magnitude'"
                )
            if CRITERIA[self.metric].full and isinstance(base.get(path), AbstractWeight):
                raise SboraxError(
                    f"LoRAPrune: {path}: a quantised weight has no gradient; use a dense base, or metric='lora'"
                )
            if CRITERIA[self.metric].pair and not pair:
                raise SboraxError(
                    f"LoRAPrune: {path}: the metric scores changes of the form s a b, and {name} makes others; use "
                    "LoRA, or metric='magnitude'"
                )
        layers = {parent.rpartition("/")[0] for parent in sites}
        for parent in sorted(f"{layer}/{block}" for layer in layers for block in BLOCKS):
            missing = sorted(BLOCKS[parent.rpartition("/")[2]].keys() - sites.get(parent, {}).keys())
            if missing:
                raise SboraxError(f"LoRAPrune: {parent}/{missing[0]} is not adapted; all seven projections must be")
        if len({site.shape for path, site in _sites(run).items() if block_of(path)[2] == "k_proj"}) > 1:
            raise SboraxError("LoRAPrune: layers of unequal size cannot be pruned again; start from the whole model")
        biased = [path for path in base if path.split("/")[-1] == "bias"]
        if not sites or biased:
            where = biased[0] if biased else "the rules"
            raise SboraxError(f"LoRAPrune: {where}: only LLaMA layers without biases, adapted by LoRA, can be pruned")

    def differentiates(self, run: Run) -> tuple[str, ...]:
        return tuple(_sites(run)) if CRITERIA[self.metric].full else ()

    def watch(self, run: Run) -> optax.GradientTransformationExtraArgs:
        sites = _sites(run)
        return watch_importance(sites, _groups(sites, run.kv_heads), self.decay, self.power, CRITERIA[self.metric])

    def start(self, key: Key[Array, ""], run: Run, boundary: Boundary) -> Boundary:
        def wrapped(path: str, node: Adapter) -> Adapter:
            _, block, module = block_of(path)
            if BLOCKS.get(block, {}).get(module) != "out":
                return node
            site = _sites(run)[path]
            mask = jnp.ones((*site.stack, site.shape[1]))
            return Adapter({"part": node.train}, {"part": node.frozen, "mask": mask}, Masked(node.method), node.in_axes)

        adapters = {path: wrapped(path, node) for path, node in nodes(boundary.adapters).items()}
        return dataclasses.replace(boundary, adapters=nest(adapters))

    def due(self, step: int, run: Run) -> bool:
        share, last = self.sparsity(step, run.steps), self._last(run)
        return step == last or (step % self.every == 0 and self.initial < share < self.ratio and step < last)

    def sparsity(self, step: int, steps: int) -> float:
        """ratio + (initial - ratio) (1 - (step - w) / (steps - w - c))^3 between warm-up w and cool-down c."""
        warmup, cooldown = self.warmup * steps, self.cooldown * steps
        if step <= warmup:
            return self.initial
        if step > steps - cooldown:
            return self.ratio
        left = 1 - (step - warmup) / (steps - warmup - cooldown)
        return self.ratio + (self.initial - self.ratio) * left**3

    def apply(self, key: Key[Array, ""], step: int, run: Run, boundary: Boundary) -> Boundary:
        share = self.ratio if step == self._last(run) else self.sparsity(step, run.steps)
        state = find_state(boundary.opt, LoRAPruneState)
        assert state is not None
        spared = {parent: self._spared(parent, run) for parent in state.masks}
        keys = dict(zip(sorted(state.scores), jax.random.split(key, len(state.scores)), strict=True))
        order = {parent: CRITERIA[self.metric].order(keys[parent], scores) for parent, scores in state.scores.items()}
        masks = {
            parent: jnp.where(spared[parent], mask, pruned(order[parent], mask, share))
            for parent, mask in state.masks.items()
        }
        opt = replace_state(boundary.opt, LoRAPruneState(state.scores, masks))
        return with_masks(dataclasses.replace(boundary, opt=opt))

    def settle(self, boundary: Boundary) -> Boundary:
        return with_masks(boundary)

    def _last(self, run: Run) -> int:
        """The first step at the final share, of which the authors' schedule stops just short."""
        return min(math.ceil(run.steps - self.cooldown * run.steps), run.steps)

    def _spared(self, parent: str, run: Run) -> Array:
        """True for the layers of a block that are never pruned, `(*stack, 1)`."""
        sites = _sites(run)
        depth = 1 + max(max(site.layers) for site in sites.values())
        site = next(site for path, site in sites.items() if block_of(path)[0] == parent)
        number = jnp.asarray(site.layers).reshape(*site.stack, 1)
        return (number < int(self.protect * depth)) | ((number == depth - 1) & (self.protect > 0))


def pruned(
    scores: Float[Array, "*stack groups"], mask: Float[Array, "*stack groups"], share: float
) -> Float[Array, "*stack groups"]:
    """The mask with the int(share * groups) groups of least score zeroed in every layer; pruned groups stay pruned."""
    # Pruned groups sort before live ones whose score is zero too.
    order = jnp.argsort(jnp.where(mask > 0, scores, -1), axis=-1)
    rank = jnp.argsort(order, axis=-1)
    return mask * (rank >= int(share * mask.shape[-1])).astype(mask.dtype)


def masks_of(opt: PyTree) -> dict[str, Float[Array, "*stack groups"]]:
    """The masks that LoRAPrune keeps in the state of an optimiser, by block; empty without it."""
    state = find_state(opt, LoRAPruneState)
    return {} if state is None else state.masks


def with_masks(boundary: Boundary) -> Boundary:
    """The boundary with the masks of the optimiser's state written into the adapters that they mask."""
    masks = masks_of(boundary.opt)

    def masked_adapter(path: str, node: Adapter) -> Adapter:
        if not isinstance(node.method, Masked):
            return node
        mask, old = masks[block_of(path)[0]], node.frozen["mask"]
        outputs = jnp.repeat(mask, old.shape[-1] // mask.shape[-1], axis=-1)
        return dataclasses.replace(node, frozen={**node.frozen, "mask": outputs.astype(old.dtype)})

    adapters = {path: masked_adapter(path, node) for path, node in nodes(boundary.adapters).items()}
    return dataclasses.replace(boundary, adapters=nest(adapters))


def _sites(run: Run) -> dict[str, Site]:
    """The adapted projections of blocks, by path."""
    return {site.path: site for site in run.plan.sites if _in_block(site.path)}


def _in_block(path: str) -> bool:
    _, block, module = block_of(path)
    return module in BLOCKS.get(block, {})


def _groups(sites: dict[str, Site], kv_heads: int) -> dict[str, int]:
    """The number of groups of each block, by its path."""
    counts = {}
    for path, site in sites.items():
        parent, block, module = block_of(path)
        if block == "self_attn":
            counts[parent] = kv_heads
        elif module == "gate_proj":
            counts[parent] = site.shape[1]
    return counts
