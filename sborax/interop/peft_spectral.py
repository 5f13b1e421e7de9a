"""Rows of the kinds with a sparse spectrum at places drawn from a seed: FOURIERFT."""

from typing import Any

import numpy as np

from sborax.adapters.core import AbstractMethod, Adapter
from sborax.interop.peft_row import ANY_START, Fields, Fit, Row, Tensor, decimal_of, number_field, whole_field
from sborax.methods import FourierFT
from sborax.methods.places import LARGEST_SEED, seeded_places

MOST_COEFFICIENTS = (1 << 31) - 1
"""Planning refuses more than the weight has entries, before any array is made."""


def _read_fourier(fields: Fields) -> Fit:
    count = whole_field(fields, "n_frequency", 1, MOST_COEFFICIENTS)
    seed = whole_field(fields, "random_loc_seed", 0, LARGEST_SEED)
    return Fit(FourierFT(coefficients=count, seed=seed), {"scale": number_field(fields, "scaling")})


def _write(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, FourierFT)
    return {
        "n_frequency": method.coefficients,
        "scaling": decimal_of(node, "scale"),
        "random_loc_seed": method.seed,
    }


def _places(method: AbstractMethod, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    assert isinstance(method, FourierFT)
    return {"idx": seeded_places(method.seed, method.coefficients, shape)}


SPECTRAL = (
    Row(
        FourierFT, "FOURIERFT", ANY_START, {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        (Tensor("fourierft_spectrum", "c", (0,)),), _read_fourier, _write,
        {"n_frequency": "n_frequency_pattern"}, pattern_form=r".*\.{}$", drawn=_places,
    ),
)  # fmt: skip
