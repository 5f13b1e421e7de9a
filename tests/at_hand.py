"""Real models and data, used beside made-up ones where they are at hand."""

import os
from pathlib import Path


def folder(variable: str, name: str) -> Path:
    """The folder that a variable names, by default one in `shared` beside the checkout."""
    return Path(os.environ.get(variable) or Path(__file__).resolve().parents[2] / "shared" / name)


STORIES = [place for place in [folder("SBORAX_MODELS", "models") / "stories260k"] if place.exists()]
"""A real LLaMA of 260,032 parameters, if it is there."""
ALPACA = [place for place in [folder("SBORAX_DATA", "data") / "alpaca_en_demo"] if place.exists()]
"""999 of Alpaca's records, if they are there."""
