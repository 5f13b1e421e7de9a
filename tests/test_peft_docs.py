"""docs/peft.md says what the code does: its table is that of the declared attributes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import IN, METHODS, OUT
from torch_pair import shaken

import sborax as sx
from sborax import methods
from sborax.adapters.core import AbstractFactored
from sborax.adapters.depth import AbstractLinked
from sborax.cli.main import _parser
from sborax.interop.factor import exact
from sborax.interop.peft_table import PLAIN, TABLE

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "peft.md").read_text()


def row(name: str) -> str:
    """What the classes and PEFT's table say of a method."""
    method = getattr(methods, name)
    rows = [one for one in TABLE if one.method is method]
    thin = issubclass(method, AbstractFactored | AbstractLinked)
    kinds = " or ".join(dict.fromkeys(one.peft_type for one in rows))
    out = kinds if any(one.write for one in rows) else "LORA" if thin else "-"
    fields = (
        {pattern for one in rows for pattern in one.patterns.values()} if out != "LORA" else PLAIN.patterns.values()
    )
    fields = sorted(fields) + ["layers_to_transform"] * (out == "LORA" or any(one.layered for one in rows))
    as_lora = "no" if method().no_merge else "exact" if thin or method is PLAIN.method else "truncated"
    shown = ", ".join(f"`{field}`" for field in fields) if out != "-" else ""
    return f"| `{name}` | {kinds or '-'} | {out} | {shown or '-'} | {as_lora} |"


def test_the_table_is_that_of_the_code():
    head = ["| method | in | out (native) | exceptions | `--as lora` |", "|---|---|---|---|---|"]
    found = re.findall(r"^\|.*\|$", PAGE, re.MULTILINE)
    assert found == [*head, *(row(name) for name in methods.__all__)]


FACTORED = list({type(case.method): case for case in METHODS if isinstance(case.method, AbstractFactored)}.values())


@pytest.mark.parametrize("case", FACTORED, ids=lambda case: case.name)
def test_exact_is_exact(case):
    """Where the table says so: the factors that are written multiply to the whole change of the original base."""
    weight, grad = np.random.default_rng(0).standard_normal((2, IN, OUT)).astype(np.float32) / 8
    hints = {"proj": sx.Hint(grad=jnp.asarray(grad))} if case.method.needs else None
    params = {"proj": {"kernel": jnp.asarray(weight)}}
    own, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)], hints=hints)
    adapters = shaken(adapters)
    pair = exact(adapters["proj"]["kernel"], (IN, OUT))
    assert pair is not None
    change = np.asarray(sx.merge(own, adapters)["proj"]["kernel"]) - weight
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(
        np.float64(pair[0]) @ np.float64(pair[1]), change, rtol=0, atol=2e-6 * max(1, np.abs(change).max())
    )


def test_its_names_are_names():
    for name in re.findall(r"sx\.(\w+)", PAGE):
        assert name in sx.__all__
    commands = next(action.choices for action in _parser()._actions if action.dest == "command")
    options = {option for one in commands.values() for action in one._actions for option in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)", PAGE)) < options
