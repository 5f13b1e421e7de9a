"""docs/peft.md and the table that the site adds to it say what the code does."""

import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bare_kernels import standalone
from cases import IN, METHODS, OUT, hint_for
from pages import DOCS
from torch_pair import shaken

import sborax as sx
from sborax.adapters.core import AbstractFactored
from sborax.cli.main import make_parser
from sborax.interop.factor import exact

PAGE = (DOCS / "peft.md").read_text()


@pytest.fixture(scope="module")
def row():
    """A method's row of the table that the site has."""
    return runpy.run_path(str(DOCS / "conf.py"))["peft_row"]


def test_readme_counts_the_methods():
    page = runpy.run_path(str(DOCS / "conf.py"))
    rows = [line.split(" | ") for line in page["peft_table"]().splitlines() if line.startswith("| `")]
    reads, writes = (sum(row[column] != "-" for row in rows) for column in (1, 2))
    figure = f"| methods | {len(rows)}, of which PEFT 0.21 lacks "
    line = next(line for line in (DOCS.parent / "README.md").read_text().splitlines() if line.startswith(figure))
    assert f"; {reads} are read from PEFT's files, {writes} are written as such" in line


PATTERNS = "`alpha_pattern`, `rank_pattern`, `layers_to_transform`"
ROWS = [
    f"| `LoRA` | LORA | LORA | {PATTERNS} | exact |",
    f"| `DoRA` | LORA | LORA | {PATTERNS} | truncated |",
    f"| `PiSSA` | LORA | LORA | {PATTERNS} | exact |",
    f"| `SBoRA` | - | LORA | {PATTERNS} | exact |",
    "| `BOFT` | BOFT | BOFT | `layers_to_transform` | truncated |",
    "| `DEFT` | DEFT | DEFT | `layers_to_transform` | truncated |",
    f"| `BDLoRA` | LORA | LORA | {PATTERNS} | exact |",
    f"| `MonteCLoRA` | LORA | LORA | {PATTERNS} | exact |",
    f"| `VeLoRA` | LORA | LORA | {PATTERNS} | exact |",
    f"| `KaSA` | LORA | LORA | {PATTERNS} | exact |",
    "| `OSF` | OSF | OSF | `rank_pattern` | exact |",
    "| `SuperTuning` | SUPERTUNING | SUPERTUNING | - | truncated |",
    "| `VBLoRA` | VBLORA | VBLORA | `layers_to_transform` | exact |",
    "| `UniLoRA` | UNILORA | UNILORA | `layers_to_transform` | exact |",
    "| `Lily` | LILY | LILY | `layers_to_transform` | no |",
    f"| `ResLoRA` | - | LORA | {PATTERNS} | exact |",
    "| `Bat` | MISS | MISS | `layers_to_transform` | truncated |",
    "| `C3A` | C3A | C3A | `block_size_pattern`, `layers_to_transform` | truncated |",
    "| `FourierFT` | FOURIERFT | FOURIERFT | `n_frequency_pattern`, `layers_to_transform` | truncated |",
    "| `GraLoRA` | GRALORA | GRALORA | `layers_to_transform` | exact |",
    "| `GLoRA` | GLORA | GLORA | - | truncated |",
    "| `IA3` | IA3 | IA3 | - | truncated |",
    "| `PEANuT` | PEANUT | PEANUT | `layers_to_transform` | truncated |",
    "| `PVeRA` | PVERA | PVERA | `layers_to_transform` | exact |",
    f"| `AdaMSS` | - | LORA | {PATTERNS} | exact |",
    f"| `PSOFT` | - | LORA | {PATTERNS} | exact |",
    "| `RoAd` | ROAD | ROAD | - | truncated |",
    "| `TinyLoRA` | TINYLORA | TINYLORA | `layers_to_transform` | exact |",
    "| `VeRA` | VERA | VERA | `layers_to_transform` | exact |",
    "| `WaveFT` | WAVEFT | WAVEFT | `n_frequency_pattern`, `layers_to_transform` | truncated |",
    "| `MiLoRA` | - | - | - | no |",
]


@pytest.mark.parametrize("expected", ROWS, ids=lambda line: line.split("`")[1])
def test_the_table_says_what_is_read_and_written(expected, row):
    assert row(expected.split("`")[1]) == expected


FACTORED = list({type(case.method): case for case in METHODS if isinstance(case.method, AbstractFactored)}.values())


@pytest.mark.parametrize("case", FACTORED, ids=lambda case: case.name)
def test_exact_is_exact(case):
    """Where the table says so: the factors that are written multiply to the whole change of the original base."""
    weight, grad = np.random.default_rng(0).standard_normal((2, IN, OUT)).astype(np.float32) / 8
    hints = {"proj": hint_for(case.method, jnp.asarray(grad), 0)} if case.method.needs else None
    params = {"proj": {"kernel": jnp.asarray(weight)}}
    attached, adapters = sx.attach(jax.random.key(0), params, [("proj", case.method)], hints=hints)
    adapters = shaken(adapters)
    pair = exact(standalone(adapters), (IN, OUT))
    assert pair is not None
    change = np.asarray(sx.merge(attached, adapters)["proj"]["kernel"]) - weight
    assert np.abs(change).max() > 1e-3
    np.testing.assert_allclose(
        np.float64(pair[0]) @ np.float64(pair[1]), change, rtol=0, atol=2e-6 * max(1, np.abs(change).max())
    )


def test_its_names_are_names():
    for name in re.findall(r"sx\.(\w+)", PAGE):
        assert name in sx.__all__
    commands = next(action.choices for action in make_parser()._actions if action.dest == "command")
    actions = [action for command in commands.values() for action in command._actions]
    options = {option for action in actions for option in action.option_strings}
    assert set(re.findall(r"`(--[\w-]+)", PAGE)) < options
