"""Models from a Hugging Face directory, the hub, or a GGUF file."""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax.numpy as jnp
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sborax.adapters.core import SboraxError
from sborax.config.documents import read_object
from sborax.config.places import candidates
from sborax.models.backends import choose, platform
from sborax.models.checkpoint import load_params, open_safetensors
from sborax.models.config import LlamaConfig, ends
from sborax.models.decoder import DecoderConfig, plain_scores
from sborax.models.gguf import open_gguf
from sborax.models.language_model import LanguageModel, Params, abstract, decoder_of
from sborax.models.llama import kept_names
from sborax.models.tokenizer import check_vocabulary, read_tokenizer

ADAPTER = "adapter_config.json"
DTYPES = ("float32", "bfloat16", "float16")
FILES = ["model*.safetensors", "*.json", "*.jinja"]
"""Files that are fetched from the hub: no pickles and no code."""


def find(source: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The directory or `.gguf` file that `source` names: a path, a name under `$SBORAX_MODELS`, or a hub id.

    - weights: whether a hub id's weights are fetched too.

    Raises SboraxError if there is no such model.
    """
    text = os.fspath(source)
    for place in candidates(text, "SBORAX_MODELS"):
        if place.is_file() and place.suffix != ".gguf":
            raise SboraxError(f"{place}: not a model; give a directory, a .gguf file or a hub id")
        if place.exists():
            return place
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", text) or text.startswith(".") or text.endswith(".gguf"):
        raise SboraxError(f"{text}: no such directory or .gguf file, and not a hub id (organisation/name)")
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=FILES if weights else FILES[1:]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as failure:
        reason = str(failure).strip().partition("\n")[0]
        raise SboraxError(f"{text}: no such directory, and not found on the hub ({reason})") from failure


def is_layer_kernel(path: str) -> bool:
    """Whether `quant` holds a leaf in 4 bits: kernels of projections inside layers."""
    return path.startswith("layers/") and path.endswith("/kernel")


def read_config(place: Path) -> LlamaConfig:
    """The config of a model directory or `.gguf` file; reads no weights."""
    if place.suffix == ".gguf":
        return open_gguf(place).config()
    file = place / "config.json"
    if (place / ADAPTER).exists():
        raise SboraxError(
            f"{place / ADAPTER}: makes the directory a PEFT adapter, for which transformers loads the base that is "
            "named there; give that base and this directory as its adapter, or remove the file"
        )
    if not file.exists():
        raise SboraxError(f"{file}: missing; is this a Hugging Face model directory?")
    config = LlamaConfig.from_hf(read_object(file), str(file))
    # An end mark of a chat's turns is often named here alone.
    generation = place / "generation_config.json"
    marks = ends(read_object(generation), str(generation), config.vocab_size) if generation.exists() else ()
    return dataclasses.replace(config, eos_token_id=tuple(dict.fromkeys([*config.eos_token_id, *marks])))


def load_config(source: str | os.PathLike[str]) -> LlamaConfig:
    """The config of the model that `source` names; reads no weights."""
    return read_config(find(source, weights=False))


def load_model(
    source: str | os.PathLike[str],
    dtype: Any = "float32",
    *,
    remat: str = "none",
    scan: bool = True,
    quant: Literal["nf4"] | None = None,
    keep: Callable[[str], bool] = lambda path: False,
    attention: str = "auto",
    expert_capacity: int | float | None = None,
    shardings: Callable[[DecoderConfig, Params], Params] | None = None,
) -> LanguageModel:
    """A model from a Hugging Face directory, a hub id, a `.gguf` file, or a name of these under `$SBORAX_MODELS`.

    - dtype: of params and activations; norms, softmax and logits are float32 in any case.
    - remat: values that are kept for the backward pass, see `sborax.models.llama.kept_names`.
    - scan: stack the layers and loop over them; otherwise unroll, which compiles slowly and runs a little faster.
    - quant: "nf4" holds the kernels of the layers in 4 bits. Each tensor is quantised as it is read, so that no dense
      model is ever in memory.
    - keep: a function of a path that is true for kernels that stay dense. Default: none.
    - attention: "xla", "cudnn" or "splash" (see `sborax.models.backends`), or "auto" (default): the fastest that can
      compute this model on this device.
    - expert_capacity: the rows that each expert of a mixture takes of a device's tokens, as a multiple of those at
        balanced load, such as 1.25; it drops tokens beyond them. None (default) drops no token.
    - shardings: for a model on a mesh, from its config and shapes. Each host reads the shards of its own devices alone.

    Raises SboraxError for anything that is missing, broken, superfluous or unsupported.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise SboraxError(f"dtype {jnp.dtype(dtype).name} is not supported; known: {', '.join(DTYPES)}")
    kept_names(remat)
    place = find(source)
    if place.suffix == ".gguf":
        tensors = open_gguf(place)
        config, tokenizer = tensors.config(), tensors.tokenizer()
    else:
        config = read_config(place)
        tensors, tokenizer = open_safetensors(place, config.family.files), read_tokenizer(place)
        if config.num_hidden_layers <= len(tensors.names()):
            tensors = tensors.parted(config.family.fused, abstract(config, dtype, scan=scan))
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size, tensors.where)
    if config.num_hidden_layers > len(tensors.names()):
        raise SboraxError(f"{tensors.where}: too few tensors for the {config.num_hidden_layers} layers of its config")
    backend = choose(attention, platform(), dtype, config.head_dim, plain_scores(config))
    module = decoder_of(config, dtype, remat, scan, backend, expert_capacity)

    def quantised(path: str) -> bool:
        return quant is not None and is_layer_kernel(path) and not keep(path)

    where = None if shardings is None else functools.partial(shardings, config)
    params = load_params(config, abstract(config, dtype, scan=scan), tensors, quantised, where)
    return LanguageModel(module, params, config, tokenizer)
