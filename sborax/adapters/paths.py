"""Which weights a run adapts: rules over module paths, resolved on the host into a plan.

Planning needs shapes alone, unless a `RankPolicy` reads weights. So mistakes are found before memory is used.
"""

import dataclasses
import functools
import hashlib
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sborax.adapters.bank import Kernel, banks, check_read
from sborax.adapters.compose import ByLayer
from sborax.adapters.core import AbstractKernelless, AbstractMethod, RankPolicy, SboraxError, Use, dense
from sborax.adapters.informed import AbstractInformed
from sborax.adapters.leaves import flatten
from sborax.adapters.patterns import compiled, search
from sborax.adapters.routing import Expert, routers
from sborax.adapters.tables import HEAD, LOOKUP, TABLE, tables, use_of, weight_at, why_no_table
from sborax.adapters.weight import check_finite

STACKED_UNDER = "layers"
"""A kernel of three axes or more under a module of this name has one leading stack axis."""
EXPERTS = "experts"
"""A kernel under a module of this name has a stack axis of experts, after that of layers."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Adapt every kernel whose module path matches `pattern`.

    Rules are tried in order, and the first that covers a kernel's layer gets it.

    - pattern: a regular expression, searched for (`re.search`) in the module path: `layers/mlp/up_proj`. The embedding,
      and a head that is tied to it, are covered only by a pattern with their name in it, `embed_tokens` or `lm_head`;
      see `tables`.
    - method: the method; None leaves what matches as it is.
    - layers: which layers: a slice, or numbers, negative ones from the end. Default None: all. A layer's number is the
      one in the path (`layers/3/...`), else the position on the first stack axis. Other stacked weights, such as the
      experts of a layer, go with their layer.
    - stack_axes: how many leading axes stack weights. Default None: one under `layers/` and one under `experts/`.
    - in_axes: how many of the kernel's other axes belong to the input. Required if these are more than two.
    - experts: which experts of a layer, in the same way: positions on the last stack axis of a kernel under `experts/`.
      Default None: all, and kernels outside of experts.

    Raises SboraxError for a pattern that is no regular expression.
    """

    pattern: str
    method: AbstractMethod | None
    layers: slice | tuple[int, ...] | None = None
    stack_axes: int | None = None
    in_axes: int | None = None
    experts: slice | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        try:
            compiled(self.pattern)
        except SboraxError as error:
            raise SboraxError(f"rule {error}") from None
        for name in ("layers", "experts"):
            if isinstance(getattr(self, name), Sequence):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def covers(self, layer: int, depth: int, expert: int | None = None, experts: int = 0) -> bool:
        """Whether the rule acts on a layer of `depth`, and there on an expert of `experts`; None for other kernels."""
        if expert is None and self.experts is not None:
            return False
        return _contains(self.layers, layer, depth) and (expert is None or _contains(self.experts, expert, experts))


def _contains(numbers: slice | tuple[int, ...] | None, number: int, count: int) -> bool:
    """Whether `number` of `count` is one of `numbers`, which may count from the end."""
    if numbers is None:
        return True
    if isinstance(numbers, slice):
        return number in range(count)[numbers]
    return number in {index % count for index in numbers if -count <= index < count}


RuleLike = Rule | tuple[str, AbstractMethod | None]


@dataclasses.dataclass(frozen=True)
class Site:
    """One kernel to adapt, or a router or a bank to place.

    - path: of the kernel; of a router, `layers/router`; of a bank, `bank/...`.
    - method: the method with its ranks resolved.
    - stack: the leading axes that stack weights.
    - shape: (in, out) of one weight; of a router, (width of the layer, number of experts); of a bank, its size.
    - in_axes: how many of the kernel's other axes belong to the input.
    - layer: the number of the layer in the path, 0 if it has none.
    - use: what the weight is, see `Hint.use`.
    - bias: whether there is a bias beside the kernel.

    Raises SboraxError for a method that takes means over tokens where only some of these are multiplied at a time.
    """

    path: str
    method: AbstractMethod
    stack: tuple[int, ...]
    shape: tuple[int, int]
    in_axes: int
    layer: int
    use: Use = "kernel"
    bias: bool = False

    def __post_init__(self) -> None:
        if not self.method.token_mean:
            return
        reader = "each expert" if stacks_experts(self.path) else "the head" if self.path == HEAD else None
        if reader:
            raise SboraxError(
                f"{self.path}: {type(self.method).__name__} takes means over tokens, of which {reader} sees some at a "
                "time; use a method that takes tokens one by one"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The layer of every weight of the flattened stack."""
        return _layers(self.path, self.stack, self.layer)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels that `attach` will adapt.

    - sites: the kernels to adapt, then routers and banks.
    - untouched: paths of the kernels that no rule covers.
    """

    sites: tuple[Site, ...]
    untouched: tuple[str, ...]


def module_path(path: str) -> tuple[str, int | None]:
    """`layers/3/mlp/up_proj/kernel` -> (`layers/mlp/up_proj`, 3): the path that rules match, and its layer or None."""
    parts = (path.rpartition("/")[0] if path in (TABLE, LOOKUP) else path.removesuffix("/kernel")).split("/")
    numbers = [int(part) for part in parts if part.isdecimal()]
    return "/".join(part for part in parts if not part.isdecimal()), numbers[0] if numbers else None


def stacks_layers(path: str, stack: Sequence[int]) -> bool:
    """Whether the first stack axis of a kernel counts layers: not if its path has a number, `layers/3/experts`."""
    parts = path.split("/")
    under_layers = STACKED_UNDER in parts and not parts[parts.index(STACKED_UNDER) + 1].isdecimal()
    return bool(stack) and (under_layers or module_path(path)[1] is None)


def stacks_experts(path: str) -> bool:
    """Whether a kernel stacks experts along the last of its stack axes: not if its path has a number, `experts/3`."""
    parts = path.split("/")
    return EXPERTS in parts and not parts[parts.index(EXPERTS) + 1].isdecimal()


def stack_axes(path: str, ndim: int) -> int:
    """How many leading axes of a kernel stack weights, by the names of its modules."""
    layers = STACKED_UNDER in path.split("/") and stacks_layers(path, (1,))
    return max(0, min(ndim - 2, layers + stacks_experts(path)))


def _layers(path: str, stack: Sequence[int], number: int) -> tuple[int, ...]:
    count = math.prod(stack)
    counted = stacks_layers(path, stack)
    return tuple(position * stack[0] // count if counted else number for position in range(count))


def weight_keys(key: Key[Array, ""], path: str, stack: Sequence[int]) -> Key[Array, "*stack"]:
    """One key for each weight of a kernel's stack.

    `key` is folded with the names in the kernel's path, its numbers and the position in the stack. So adding a target
    changes the keys of no other kernel, and a stack has the keys of its layers.
    """
    digest = hashlib.sha1(module_path(path)[0].encode()).digest()
    key = jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
    numbers = [int(part) for part in path.split("/") if part.isdecimal()]
    for number in numbers:
        key = jax.random.fold_in(key, number)
    if stack:
        folded = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(math.prod(stack)))
        return folded.reshape(*stack, *folded.shape[1:])
    return key if numbers else jax.random.fold_in(key, 0)


def hint_of(hints: Mapping[str, Any] | None, path: str) -> Any:
    """The hint for one kernel: by its path without `/kernel`, else by its module path, else None."""
    by_path = hints or {}
    return by_path.get(path.removesuffix("/kernel"), by_path.get(module_path(path)[0]))


def kernels(params: Any) -> dict[str, Any]:
    """Every leaf named `kernel` by its path, in tree order."""
    return {path: leaf for path, leaf in flatten(params).items() if path.rpartition("/")[2] == "kernel"}


def adaptable(params: Any) -> dict[str, Any]:
    """Every weight that may have an adapter by the adapter's path: kernels, and `tables`."""
    return {**kernels(params), **tables(params)}


def bias_path(kernel: str) -> str:
    """The path of the bias beside a kernel, whether there is one or not."""
    return f"{kernel.removesuffix('kernel')}bias"


def as_rules(rules: Iterable[RuleLike]) -> tuple[Rule, ...]:
    """The rules, with a `Rule` for every tuple `(pattern, method)`."""
    return tuple(rule if isinstance(rule, Rule) else Rule(*rule) for rule in rules)


def _axes(path: str, ndim: int, rule: Rule) -> tuple[int, int]:
    """How many leading axes are stack axes, and how many of the others are input axes."""
    stack = rule.stack_axes if rule.stack_axes is not None else stack_axes(path, ndim)
    matrix_axes = ndim - stack
    if matrix_axes < 2:
        raise SboraxError(f"{path}: a kernel of {ndim} axes has no (in, out) pair after {stack} stack axes")
    if matrix_axes > 2 and rule.in_axes is None:
        raise SboraxError(
            f"{path}: {ndim} axes, {stack} of them stack axes: say which are input and output with "
            f"Rule({rule.pattern!r}, ..., in_axes=...) or stack_axes=..."
        )
    in_axes = rule.in_axes or 1
    if not 0 < in_axes < matrix_axes:
        raise SboraxError(f"{path}: in_axes={in_axes} leaves no output axis among {matrix_axes}")
    return stack, in_axes


def _ranks(
    site: str, weight: Any, layers: Sequence[int], stack: Sequence[int], shape: tuple[int, int], depth: int
) -> Callable[[RankPolicy], int | tuple[int, ...]]:
    """A function that asks a policy for the ranks of one kernel."""

    def reader(position: int) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            if isinstance(weight, jax.ShapeDtypeStruct):
                raise SboraxError(f"{site}: this rank policy reads the weights; plan on a loaded model")
            place = tuple(int(index) for index in np.unravel_index(position, stack)) if stack else ()
            layer = jax.tree.map(lambda leaf: leaf[place], weight) if stack else weight
            check_finite(site, layer)
            return np.asarray(dense(layer), np.float32).reshape(shape)

        return load

    def choose(policy: RankPolicy) -> int | tuple[int, ...]:
        ranks = policy.ranks([reader(position) for position in range(len(layers))], layers, depth)
        return ranks[0] if len(set(ranks)) == 1 else tuple(ranks)

    return choose


def plan(params: Any, rules: Iterable[RuleLike], *, hints: Mapping[str, Any] | None = None) -> Plan:
    """Matches rules with kernels, resolves ranks and checks shapes.

    Args:
    - params: the parameters of a model, or their `jax.ShapeDtypeStruct`s. A rank policy may need the arrays.
    - rules: `Rule`s, or tuples `(pattern, method)`, in order: the first match wins.
    - hints: a `Hint` by module path, for methods that need one. `layers/3/mlp/up_proj` wins over `layers/mlp/up_proj`.

    Raises SboraxError for a rule that matches nothing, a shape that a method refuses, a missing hint, and methods that
    disagree about what they share.
    """
    rules = as_rules(rules)
    weights, of_tables, leaves = kernels(params), tables(params), flatten(params)
    numbers = [module_path(path)[1] for path in weights]
    numbered_depth = 1 + max((number for number in numbers if number is not None), default=0)
    hits: set[int] = set()
    sites, untouched = [], []
    untied = HEAD in of_tables and any(_covers_table(rule, "lm_head") for rule in rules)
    without = {TABLE if untied else LOOKUP}
    for path, weight in {**weights, **of_tables}.items():
        name, number = module_path(path)
        is_table = path in of_tables
        matching = [
            (i, rule)
            for i, rule in enumerate(rules)
            if path not in without and (_covers_table(rule, name) if is_table else search(rule.pattern, name))
        ]
        if not matching:
            untouched += [] if is_table else [path]
            continue
        axes, in_axes = _axes(path, len(weight.shape), matching[0][1])
        stack, sizes = tuple(weight.shape[:axes]), weight.shape[axes:]
        layers = _layers(path, stack, number or 0)
        depth = stack[0] if stacks_layers(path, stack) else numbered_depth
        by_rule = _by_rule(rules, matching, layers, depth, stack[-1] if stack and stacks_experts(path) else None)
        hits |= by_rule.keys()
        adapted = {i: positions for i, positions in by_rule.items() if rules[i].method is not None}
        if not adapted:
            untouched += [] if is_table else [path]
            continue
        shape = (math.prod(sizes[:in_axes]), math.prod(sizes[in_axes:]))
        choose = _ranks(name, weight_at(path, leaves) if is_table else weight, layers, stack, shape, depth)
        parts = []
        for i, positions in adapted.items():
            method = rules[i].method
            assert method is not None
            if is_table and (why := why_no_table(method, use_of(path, of_tables))):
                raise SboraxError(f"{path}: {type(method).__name__} cannot adapt the table of the embedding: {why}")
            method = _resolved(method, choose)
            in_layers = stacks_layers(path, stack) if axes == 1 else axes == 0 and number is not None
            _check_place(path, method, in_layers)
            _check(path, method, shape, hint_of(hints, path), weight.shape)
            parts.append((method, tuple(positions)))
        everywhere = len(parts) == 1 and len(parts[0][1]) == len(layers)
        method = parts[0][0] if everywhere else ByLayer(tuple(m for m, _ in parts), tuple(p for _, p in parts))
        bias = not is_table and bias_path(path) in leaves
        sites.append(Site(path, method, stack, shape, in_axes, number or 0, use_of(path, of_tables), bias))
    unused = [rule.pattern for i, rule in enumerate(rules) if i not in hits]
    if unused:
        raise SboraxError(
            f"rule {unused[0]!r} matches no kernel (or only ones that an earlier rule took); "
            f"the kernels are {', '.join(sorted({module_path(path)[0] for path in weights})) or 'none'}"
        )
    check_read(_kernels(sites))
    return allotted(Plan((*sites, *_router_sites(sites, weights), *bank_sites(sites)), tuple(untouched)), hints or {})


def _by_rule(
    rules: Sequence[Rule], matching: Sequence[tuple[int, Rule]], layers: Sequence[int], depth: int, experts: int | None
) -> dict[int, list[int]]:
    """The positions in a kernel's stack that each rule takes, by the number of the rule: the first that covers them.

    - matching: the rules whose pattern matches, with their numbers.
    - layers: the layer of every position.
    - experts: how many experts each layer has; None for a kernel without.
    """
    by_rule: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        expert = (None, 0) if experts is None else (position % experts, experts)
        first = next((i for i, rule in matching if rule.covers(layer, depth, *expert)), None)
        if first is not None:
            by_rule.setdefault(first, []).append(position)
    return by_rule


def _check_place(path: str, method: AbstractMethod, in_layers: bool) -> None:
    """Raise SboraxError for a method that cannot work at a kernel of that path.

    - in_layers: whether the kernel is that of a stack of layers, or of a numbered one.
    """
    if method.linked and not in_layers:
        raise SboraxError(
            f"{path}: {type(method).__name__} links layers, so the kernel must be stacked (one leading axis) "
            "or under a numbered layer (layers/3/...); give it to the kernels of layers alone"
        )


def allotted(chosen: Plan, hints: Mapping[str, Any]) -> Plan:
    """The plan with the ranks that hints give, layer by layer. Weights of rank 0 get no adapter.

    A method gets ranks if it was planned with one rank for all layers. Methods inside a sum or a chain keep theirs.

    Args:
    - hints: `Hint`s as for `plan`. Those without `ranks` change nothing.
    """
    sites, untouched = [], list(chosen.untouched)
    for site in chosen.sites:
        hint = hint_of(hints, site.path)
        method = site.method if hint is None or hint.ranks is None else _allotted(site, hint.ranks)
        if method is None:
            untouched.append(site.path)
        else:
            sites.append(dataclasses.replace(site, method=method))
    return Plan(tuple(sites), tuple(untouched))


def _allotted(site: Site, ranks: tuple[int, ...]) -> AbstractMethod | None:
    """The method of a site with these ranks; None if no weight has one."""
    everywhere = tuple(range(len(ranks)))
    parts = zip(site.method.parts, site.method.layers, strict=True) if isinstance(site.method, ByLayer) else ()
    methods, layers = [], []
    for method, positions in tuple(parts) or ((site.method, everywhere),):
        if isinstance(method, AbstractInformed) and isinstance(method.rank, int):
            positions = tuple(position for position in positions if ranks[position] > 0)
            widest = max((ranks[position] for position in positions), default=0)
            planned = tuple(ranks[position] if position in positions else widest for position in everywhere)
            method = method.with_ranks(planned if len(set(planned)) > 1 else widest)
        if positions:
            methods.append(method)
            layers.append(positions)
    if layers == [everywhere]:
        return methods[0]
    return ByLayer(tuple(methods), tuple(layers)) if methods else None


def _covers_table(rule: Rule, name: str) -> bool:
    """Whether a rule is for a table: its pattern names it, so that `.*` covers all kernels and no table."""
    return name in rule.pattern and search(rule.pattern, name)


def _router_sites(sites: Sequence[Site], weights: Mapping[str, Any]) -> list[Site]:
    """The routers of the methods at these sites. weights: every kernel of the model by its path."""
    planned = {
        site.path: Expert(
            site.method, site.stack[: stacks_layers(site.path, site.stack)], not isinstance(site.method, ByLayer)
        )
        for site in sites
    }
    stacks = {site.path: len(site.stack) for site in sites}
    widths = {
        path: weight.shape[stacks.get(path, stack_axes(path, len(weight.shape)))] for path, weight in weights.items()
    }
    placed = routers(planned, widths, STACKED_UNDER)
    return [Site(path, method, stack, shape, 1, module_path(path)[1] or 0) for path, method, stack, shape in placed]


def bank_sites(sites: Sequence[Site]) -> list[Site]:
    """The banks of the methods at these sites. Raises SboraxError for methods that disagree about one."""
    placed = banks(_kernels(sites))
    return [Site(path, method, (), method.shape, 1, 0) for path, method in placed.items()]


def _kernels(sites: Sequence[Site]) -> list[Kernel]:
    return [Kernel(site.path, site.method, site.stack, site.shape) for site in sites]


def _check(path: str, method: AbstractMethod, shape: tuple[int, int], hint: Any, kernel: Sequence[int]) -> None:
    """Raise SboraxError for a method that cannot adapt a weight of this shape, or lacks a hint.

    - kernel: the shape of the kernel, stack axes included.
    """
    if isinstance(method, AbstractKernelless):
        raise SboraxError(f"{path}: {type(method).__name__} is placed by the method it belongs to; give that one")
    if isinstance(method.rank, tuple) and not method.ragged:
        raise SboraxError(f"{path}: {type(method).__name__} takes one rank for all layers of a stack")
    try:
        _check_bounds(method)
        method.check(shape)
    except SboraxError as error:
        raise SboraxError(f"{path} {shape}: {error}") from None
    missing = [need for need in sorted(method.needs) if hint is None or getattr(hint, need) is None]
    if missing:
        raise SboraxError(f"{path}: {type(method).__name__} needs hint {missing[0]!r} for this kernel")
    if hint is not None and "grad" in method.needs and tuple(hint.grad.shape) != tuple(kernel):
        raise SboraxError(f"{path}: the gradient has shape {tuple(hint.grad.shape)}, the kernel {tuple(kernel)}")


def _check_bounds(value: Any) -> None:
    """Raise SboraxError for a number of a method, or of its parts, that means nothing.

    Such a number is at or below its bound, negative in a field that is not `signed`, not finite, or a fraction in a
    field of whole numbers.
    """
    if isinstance(value, tuple):
        for part in value:
            _check_bounds(part)
    if not isinstance(value, AbstractMethod):
        return
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        setting, bound = getattr(value, field.name), field.metadata.get("above")
        name = f"{type(value).__name__}: {field.name}"
        if isinstance(setting, int | float | np.number) and not isinstance(setting, bool):
            kinds = typing.get_args(field.type) or (field.type,)
            if not -math.inf < setting < math.inf:
                raise SboraxError(f"{name} must be a finite number, got {setting}")
            if int in kinds and float not in kinds and not isinstance(setting, int | np.integer):
                raise SboraxError(f"{name} must be a whole number, got {setting}")
            if bound is not None and not setting > bound:
                raise SboraxError(f"{name} must be above {bound:g}, got {setting:g}")
            if setting < 0 and not field.metadata.get("signed"):
                raise SboraxError(f"{name} must be 0 or more, got {setting:g}")
        _check_bounds(setting)


def has_policy(method: AbstractMethod) -> bool:
    """Whether a policy chooses a rank of the method or of one of its parts."""

    def is_open(value: Any) -> bool:
        if isinstance(value, tuple):
            return any(map(is_open, value))
        return isinstance(value, RankPolicy) or (isinstance(value, AbstractMethod) and has_policy(value))

    return any(map(is_open, vars(method).values()))


def _resolved(method: AbstractMethod, choose: Callable[[RankPolicy], int | tuple[int, ...]]) -> AbstractMethod:
    """The method with every rank policy, parts included, replaced by what `choose` returns."""

    def resolve(value: Any) -> Any:
        if isinstance(value, RankPolicy):
            return choose(value)
        if isinstance(value, AbstractMethod):
            return _resolved(value, choose)
        return tuple(resolve(part) for part in value) if isinstance(value, tuple) else value

    return type(method)(**{name: resolve(value) for name, value in vars(method).items()})
