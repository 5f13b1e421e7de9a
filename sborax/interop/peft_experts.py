"""LoRA on experts in PEFT's files, where one parameter holds the experts of a layer (`target_parameters`).

transformers fuses the kernels of a layer's experts into `experts.gate_up_proj` (experts, gate and up, in) and
`experts.down_proj` (experts, out, in). PEFT keeps one pair of tensors for each: `lora_A` (experts x rank, in), and
`lora_B` (out, rank x experts). So gate and up share their `a` there, and here each has a copy.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sborax.adapters.core import Adapter, SboraxError, structure
from sborax.adapters.depth import stack_of
from sborax.adapters.leaves import flatten
from sborax.adapters.paths import stacks_experts
from sborax.interop.factor import by_layer, exact
from sborax.interop.peft_layout import PREFIX
from sborax.interop.peft_row import Fit
from sborax.models.names import hf_module, unlayered

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The parameters of a layer's experts in transformers, in their order, and the kernels that each holds."""
FIELD = "target_parameters"


class Written(NamedTuple):
    """The adapters of experts in PEFT's form: plain LoRA of scale 1.

    - tensors: by their names in the file.
    - rank: of all of them.
    - parameters: the field `target_parameters`.
    """

    tensors: dict[str, np.ndarray]
    rank: int
    parameters: list[str]


class Pair(NamedTuple):
    """The factors of one fused parameter: a (experts, rank, in) and b (experts, out, rank)."""

    a: Float[np.ndarray, "experts rank fan_in"]
    b: Float[np.ndarray, "experts fan_out rank"]


def _key(module: str, parameter: str, parameters: list[str], half: str) -> str:
    """PEFT's name of a tensor. It wraps a module once for each parameter, the first one innermost."""
    inner = ".base_layer" * (len(parameters) - 1 - parameters.index(parameter))
    return f"{PREFIX}{module}{inner}.lora_{half}.weight"


def _modules(path: str, layers: int) -> list[str]:
    """transformers' module of the experts of every layer that the kernel at `path` stacks."""
    numbered = unlayered(path)[1]
    numbers = range(layers) if numbered is None else [numbered]
    return [hf_module(path, number, 0).rpartition(".0.")[0] for number in numbers]


def write_experts(adapters: Mapping[str, Adapter], leaves: Mapping[str, Any]) -> Written:
    """The adapters of experts as plain LoRA.

    Exact: kernels of one parameter with different `a` are written side by side. Kernels without an adapter, and what
    pads to the largest rank, are zeros.

    Args:
    - adapters: adapters of experts by the path of their kernel.
    - leaves: the parameters of the model by path.

    Raises SboraxError for a method without thin factors.
    """
    factors = {path: _factors(path, node, leaves[path].shape[-2:]) for path, node in adapters.items()}
    adapted = {path.removesuffix("/kernel").rpartition("/")[2] for path in factors}
    parameters = [name for name, kernels in FUSED.items() if adapted & set(kernels)]
    tensors: dict[str, np.ndarray] = {}
    tops = sorted({path.removesuffix("/kernel").rpartition("/")[0] for path in leaves if stacks_experts(path)})
    pairs: dict[tuple[str, str], Pair] = {}
    for top in tops:
        for name in parameters:
            paths = [f"{top}/{kernel}/kernel" for kernel in FUSED[name]]
            *stack, fan_in, _ = leaves[paths[0]].shape
            count, experts = math.prod(stack), stack[-1]
            widths = [leaves[path].shape[-1] for path in paths]
            fused = [_fuse([factors.get(path, {}).get(i) for path in paths], fan_in, widths) for i in range(count)]
            for layer, module in enumerate(_modules(paths[0], count // experts)):
                pairs[module, name] = _stacked(fused[layer * experts : (layer + 1) * experts])
    rank = max(pair.a.shape[1] for pair in pairs.values())
    for (module, name), pair in pairs.items():
        missing = rank - pair.a.shape[1]
        a = np.pad(pair.a, ((0, 0), (0, missing), (0, 0)))
        b = np.pad(pair.b, ((0, 0), (0, 0), (0, missing)))
        tensors[_key(module, name, parameters, "A")] = a.reshape(-1, a.shape[-1])
        tensors[_key(module, name, parameters, "B")] = np.ascontiguousarray(
            b.transpose(1, 2, 0).reshape(b.shape[1], -1)
        )
    return Written(tensors, rank, [f"mlp.experts.{name}" for name in parameters])


def _factors(path: str, node: Adapter, shape: tuple[int, ...]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Thin factors by the position in the flattened stack."""
    stack = stack_of(node)
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[len(stack) :]), node)
    factors = {}
    for position, part in by_layer(flat, math.prod(stack)):
        pair = exact(part, (shape[0], shape[1]))
        if pair is None or position is None:
            raise SboraxError(
                f"{path}: PEFT adapts experts by LoRA alone, and {type(part.method).__name__} has no thin factors; "
                "merge it and save the model"
            )
        factors[position] = pair
    return factors


def _fuse(
    factors: list[tuple[np.ndarray, np.ndarray] | None], fan_in: int, widths: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """a (rank, in) and b (out, rank) of one expert's kernels, whose outputs lie one after the other."""
    pairs = [pair for pair in factors if pair is not None]
    if not pairs:
        return np.zeros((1, fan_in), np.float32), np.zeros((sum(widths), 1), np.float32)
    shared = len(pairs) == len(factors) and all(np.array_equal(a, pairs[0][0]) for a, _ in pairs)
    if shared:
        return pairs[0][0].T, np.concatenate([b.T for _, b in pairs])
    rank = sum(a.shape[1] for a, _ in pairs)
    b, row, column = np.zeros((sum(widths), rank), np.float32), 0, 0
    for pair, width in zip(factors, widths, strict=True):
        if pair is not None:
            b[row : row + width, column : column + pair[1].shape[0]] = pair[1].T
            column += pair[1].shape[0]
        row += width
    return np.concatenate([a.T for a, _ in pairs]), b


def _stacked(experts: list[tuple[np.ndarray, np.ndarray]]) -> Pair:
    """The factors of a layer's experts, padded to the largest rank."""
    rank = max(a.shape[0] for a, _ in experts)
    a = np.stack([np.pad(a, ((0, rank - a.shape[0]), (0, 0))) for a, _ in experts])
    b = np.stack([np.pad(b, ((0, 0), (0, rank - b.shape[1]))) for _, b in experts])
    return Pair(a, b)


class Door(NamedTuple):
    """What a file says of experts.

    - shapes: the shape of every tensor by its name in the file.
    - fill: makes the adapters by path from a function that reads a tensor by name.
    """

    shapes: dict[str, tuple[int, ...]]
    fill: Callable[[Callable[[str], np.ndarray]], dict[str, Adapter]]


def read_experts(config: Mapping[str, Any], params: Any, fit_of: Callable[[str], Fit]) -> Door:
    """What a config's `target_parameters` means for a model of these parameters.

    Args:
    - config: the fields of `adapter_config.json`.
    - params: the parameters of the model.
    - fit_of: the LoRA of a module by its name, from the rest of the config.

    Raises SboraxError for parameters that are not experts, and for ranks that differ.
    """
    texts, leaves = config[FIELD], flatten(params)
    if not isinstance(texts, list) or not all(isinstance(name, str) for name in texts):
        raise SboraxError(f"{FIELD}: expected a list of names, got {str(texts)[:60]}")
    kernels = {path: leaf for path, leaf in leaves.items() if stacks_experts(path) and path.endswith("/kernel")}
    parameters = [name for name in FUSED if any(_names(text, name) for text in texts)]
    unknown = [text for text in texts if not any(_names(text, name) for name in FUSED)]
    if config.get("fan_in_fan_out"):
        raise SboraxError(f"fan_in_fan_out: PEFT has no {FIELD} with it")
    if unknown or not kernels:
        raise SboraxError(f"{FIELD}: this model has no parameter {str((unknown or texts)[0])[:60]!r} of experts")
    tops = sorted({path.removesuffix("/kernel").rpartition("/")[0] for path in kernels})
    places: dict[tuple[str, str], tuple[dict[str, Fit], tuple[int, ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for top in tops:
        for name in parameters:
            paths = [f"{top}/{kernel}/kernel" for kernel in FUSED[name]]
            *stack, fan_in, _ = kernels[paths[0]].shape
            fits = {module: fit_of(f"{module}.{name}") for module in _modules(paths[0], math.prod(stack[:-1]))}
            ranks = {fit.method.rank for fit in fits.values()}
            if len(ranks) > 1:
                raise SboraxError(f"{FIELD}: experts of different layers have different ranks, which is not supported")
            (rank,) = ranks
            assert isinstance(rank, int)
            places[top, name] = (fits, tuple(stack))
            out = sum(kernels[path].shape[-1] for path in paths)
            for module in fits:
                shapes[_key(module, name, parameters, "A")] = (stack[-1] * rank, fan_in)
                shapes[_key(module, name, parameters, "B")] = (out, rank * stack[-1])

    def fill(read: Callable[[str], np.ndarray]) -> dict[str, Adapter]:
        adapters = {}
        for (top, name), (fits, stack) in places.items():
            experts, method = stack[-1], next(iter(fits.values())).method
            a = np.stack([read(_key(module, name, parameters, "A")) for module in fits])
            b = np.stack([read(_key(module, name, parameters, "B")) for module in fits])
            a = a.reshape(*stack, -1, a.shape[-1]).swapaxes(-1, -2)
            b = np.moveaxis(b.reshape(len(fits), b.shape[1], -1, experts), (3, 2), (1, 2))
            b = b.reshape(*stack, *b.shape[-2:])
            start = 0
            for kernel in FUSED[name]:
                path = f"{top}/{kernel}/kernel"
                stop = start + kernels[path].shape[-1]
                train = {"a": jnp.asarray(a), "b": jnp.asarray(b[..., start:stop])}
                adapters[path] = Adapter(train, _frozen(list(fits.values()), stack), structure(method))
                start = stop
        return adapters

    return Door(shapes, fill)


def _frozen(fits: list[Fit], stack: tuple[int, ...]) -> dict[str, Any]:
    """The frozen leaves that the config gives, one value a layer, for all experts of the layer."""

    def leaf(name: str) -> Float[jax.Array, "*stack"]:
        values = np.array([fit.frozen[name] for fit in fits], np.float32)
        return jnp.asarray(np.repeat(values, stack[-1]).reshape(stack))

    return {name: leaf(name) for name in fits[0].frozen}


def _names(text: str, parameter: str) -> bool:
    """Whether an entry of `target_parameters` means a parameter of experts: any end of its full name."""
    return f".mlp.experts.{parameter}".endswith(f".{text}")
