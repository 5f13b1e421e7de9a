"""What stands in the hyper-parameters of an attached adapter's method: no value, and no use of it goes unnoticed."""

import copy
import dataclasses
import json
import math
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import METHODS, Case

import sborax as sx
from sborax.adapters.core import AbstractMethod, structure
from sborax.adapters.stripped import STRIPPED
from sborax.config.codec import decode, encode

pytestmark = pytest.mark.quick

USES = {
    "bool": bool,
    "not": operator.not_,
    "float": float,
    "int": int,
    "index": operator.index,
    "round": round,
    "isfinite": math.isfinite,
    "above": lambda value: value > 0.0,
    "below": lambda value: 0.0 < value,
    "between": lambda value: 0.0 <= value < 1.0,
    "largest": lambda value: max(0.0, value),
    "negative": operator.neg,
    "plus": lambda value: value + 1.0,
    "times": lambda value: 2.0 * value,
    "over": lambda value: value / 4,
    "under": lambda value: 4 / value,
    "power": lambda value: 2.0**value,
    "numpy scalar": lambda value: np.float32(2.0) * value,
    "numpy array": lambda value: np.ones(2) * value,
    "asarray": np.asarray,
    "jax array": lambda value: jnp.ones(2) * value,
    "under a jax array": lambda value: value / jnp.ones(2),
    "jax scalar": jnp.float32,
    "jax function": jnp.sqrt,
    "attribute": lambda value: value.real,
    "call": lambda value: value(),
    "len": len,
    "iterate": list,
    "item": lambda value: value[0],
    "membership": lambda value: 1 in value,
    "str": str,
    "format": lambda value: f"{value}",
    "format spec": lambda value: f"{value:g}",
}


def methods_in(method: AbstractMethod) -> list[AbstractMethod]:
    """The method and those it is made of."""
    values = [getattr(method, field.name) for field in dataclasses.fields(method)]  # type: ignore[arg-type]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [method, *(inner for part in parts if isinstance(part, AbstractMethod) for inner in methods_in(part))]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_use_is_an_error(use):
    with pytest.raises(sx.SboraxError, match="hyper-parameter of an attached adapter") as raised:
        use(STRIPPED)
    assert "\n" not in str(raised.value)


def test_it_is_one_object_that_structures_can_hold():
    assert repr(STRIPPED) == "STRIPPED"
    assert STRIPPED == STRIPPED and STRIPPED is not None and STRIPPED != 0.0
    assert {STRIPPED: 1}[STRIPPED] == 1
    for twin in (copy.copy(STRIPPED), copy.deepcopy(STRIPPED), pickle.loads(pickle.dumps(STRIPPED))):
        assert twin is STRIPPED
    with pytest.raises(AttributeError):
        STRIPPED.value = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_every_hyper_parameter_of_a_structure_is_stripped(case: Case):
    bare = structure(case.method)
    for method in methods_in(bare):
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            value = getattr(method, field.name)
            assert (value is STRIPPED) == bool(field.metadata.get("hyper")), field.name
            if value is STRIPPED:
                with pytest.raises(sx.SboraxError):
                    _ = 2.0 * value
    for twin in (structure(bare), copy.deepcopy(bare), pickle.loads(pickle.dumps(bare))):
        assert twin == bare and hash(twin) == hash(bare)
    repr(bare)


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_files_say_null(case: Case):
    bare = structure(case.method)
    record = json.loads(json.dumps(encode(bare)))
    assert decode(AbstractMethod, record, structural=True) == bare  # type: ignore[type-abstract]
    hyper = [field.name for field in dataclasses.fields(bare) if field.metadata.get("hyper")]  # type: ignore[arg-type]
    assert all(record[name] is None for name in hyper)
    # A file that was written before the method had these fields.
    subset = {name: value for name, value in record.items() if name not in hyper}
    assert decode(AbstractMethod, subset, structural=True) == bare  # type: ignore[type-abstract]


def test_a_null_that_is_no_hyper_parameter_stays_none():
    bare = structure(sx.Bone(rank=4))
    twin = decode(AbstractMethod, encode(bare), structural=True)  # type: ignore[type-abstract]
    assert isinstance(twin, sx.Bone) and twin.mini_rank is None and twin.dropout is STRIPPED


def test_null_in_a_config_is_a_value():
    method = decode(AbstractMethod, {"type": "LoRA", "rank": 4, "alpha": None})  # type: ignore[type-abstract]
    assert isinstance(method, sx.LoRA) and method.alpha is None


def test_a_method_that_reads_its_alpha_in_a_program_fails():
    """Where None stood, it would have meant s = 1."""
    method = structure(sx.LoRA(rank=4, alpha=8.0))
    assert isinstance(method, sx.LoRA) and method.alpha is not None

    def scaled(x: jax.Array) -> jax.Array:
        return x if method.alpha is None else method.alpha * x

    with pytest.raises(sx.SboraxError, match="attached adapter"):
        jax.jit(scaled)(jnp.ones(2))
