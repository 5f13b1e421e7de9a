"""Rows of the kinds with a sparse spectrum at places drawn from a seed: FOURIERFT, WAVEFT."""

from typing import Any

import numpy as np

from sborax.adapters.core import AbstractMethod, Adapter
from sborax.interop.peft_row import ANY_START, Fields, Fit, Row, Tensor, decimal_of, number_field, whole_field
from sborax.methods import FourierFT, WaveFT
from sborax.methods.places import LARGEST_SEED, seeded_places

MOST_COEFFICIENTS = (1 << 31) - 1
"""Planning refuses more than the weight has entries, before any array is made."""
PATTERNS = {"n_frequency": "n_frequency_pattern"}


def _sizes(fields: Fields) -> dict[str, Any]:
    return {
        "coefficients": whole_field(fields, "n_frequency", 1, MOST_COEFFICIENTS),
        "seed": whole_field(fields, "random_loc_seed", 0, LARGEST_SEED),
    }


def _scale(fields: Fields) -> dict[str, float]:
    return {"scale": number_field(fields, "scaling")}


def _fields(node: Adapter) -> dict[str, Any]:
    method = node.method
    assert isinstance(method, FourierFT | WaveFT)
    return {"n_frequency": method.coefficients, "scaling": decimal_of(node, "scale"), "random_loc_seed": method.seed}


def _places(method: AbstractMethod, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    assert isinstance(method, FourierFT | WaveFT)
    return {"idx": seeded_places(method.seed, method.coefficients, shape)}


def _with_wavelet(node: Adapter) -> dict[str, Any] | None:
    method = node.method
    assert isinstance(method, WaveFT)
    return None if method.wavelet is None else _fields(node)


SPECTRAL_OPTIONS = {"use_idwt": True, "wavelet_family": "db1"}
"""PEFT's defaults of the fields that tell rows apart."""
WAVELET_FIELDS = {"n_frequency": 2592, "scaling": 25.0, "random_loc_seed": 777}
PROPORTIONAL = {"proportional_parameters": "numbers of coefficients would follow from the sizes of all weights"}
SPECTRUM = (Tensor("waveft_spectrum", "c", (0,)),)
SPECTRAL = (
    Row(
        FourierFT, "FOURIERFT", ANY_START, {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        (Tensor("fourierft_spectrum", "c", (0,)),),
        lambda fields: Fit(FourierFT(**_sizes(fields)), _scale(fields)), _fields,
        PATTERNS, pattern_form=r".*\.{}$", seeded=_places,
    ),
    Row(
        WaveFT, "WAVEFT", {"use_idwt": (True,), "wavelet_family": ("db1",), **ANY_START}, WAVELET_FIELDS, SPECTRUM,
        lambda fields: Fit(WaveFT(**_sizes(fields)), _scale(fields)), _with_wavelet, PATTERNS, seeded=_places,
        refused=PROPORTIONAL | {"wavelet_family": "other wavelets than db1"},
    ),
    Row(
        WaveFT, "WAVEFT", {"use_idwt": (False,), **ANY_START}, WAVELET_FIELDS, SPECTRUM,
        lambda fields: Fit(WaveFT(**_sizes(fields), wavelet=None), _scale(fields)), _fields, PATTERNS,
        inert={"wavelet_family": "unused without a transform"}, refused=PROPORTIONAL, seeded=_places,
    ),
)  # fmt: skip
