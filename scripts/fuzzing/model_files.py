"""Model files: weights, their index, config, GGUF."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

import sborax as sx
from sborax.cli.plan import show
from sborax.data.source import read as read_records
from sborax.interop.peft_load import load_peft
from sborax.models import save_hf
from sborax.models.checkpoint import INDEX, load_params, open_safetensors
from sborax.models.config import LlamaConfig
from sborax.models.gguf import open_gguf
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.llama import Llama
from sborax.models.load import load_model, read_config
from sborax.records.adapter import read_adapter, save_adapter
from sborax.records.report import METRICS, Metrics
from sborax.train.experiment import load_experiment

from .gguf_file import describe, pack
from .mutations import TEXTS, harm, harm_bytes, write
from .seeds import Prepare, abstract_tiny, put, tiny, tokenizer

BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "C64": 64,
    "F4": 4,
}


def _rebuilt(random: Random, header: dict[str, Any]) -> bytes:
    """A valid file of other tensors: renamed, removed, with other dtypes or shapes, zero or NaN."""
    header = {name: dict(entry) for name, entry in header.items() if name != "__metadata__"}
    for name in random.sample(sorted(header), min(len(header), random.choice((1, 1, 2, 3)))):
        entry, kind = header[name], random.randrange(6)
        if kind == 0:
            header[random.choice((random.choice(TEXTS), f"{name}.x", name.replace("0", "7")))] = header.pop(name)
        elif kind == 1:
            del header[name]
        elif kind < 4:
            entry["dtype"] = random.choice(list(BITS))
        else:
            shape = entry["shape"]
            changed = (
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                shape[:-1],
                [math.prod(shape)],
                [0, *shape],
                [],
                [3, 2**20],
            )
            entry["shape"] = random.choice(changed)
    rebuilt: dict[str, Any]
    rebuilt, parts, offset = {"__metadata__": {"format": random.choice(("pt", *TEXTS[:12]))}}, [], 0
    for name, entry in header.items():
        size = math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8
        rebuilt[name] = {**entry, "data_offsets": [offset, offset + size]}
        parts.append((b"\xff" if random.randrange(20) == 0 else b"\0") * size)
        offset += size
    text = json.dumps(rebuilt).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def _harmed_safetensors(random: Random, raw: bytes) -> bytes:
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    if random.randrange(2):
        return _rebuilt(random, header)
    kind = random.randrange(8)
    if kind == 0:
        return harm_bytes(random, raw[: 8 + length]) + data
    text = write(random, harm(random, header))
    size = (
        len(text) if kind > 1 else random.choice((0, len(text) - 1, len(text) + 1, len(raw), 2**40, 2**63, 2**64 - 1))
    )
    if kind == 2:
        data = data[: random.randrange(len(data) + 1)]
    return struct.pack("<Q", size % 2**64) + text + data


def _model_files(home: Path) -> dict[str, bytes]:
    for name, size in (("one", 1 << 30), ("many", 1_000)):
        save_hf(home / name, tiny(), tiny().params, shard_bytes=size)
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(home.glob("*/*"))}


def _read_model(place: Path) -> Any:
    return load_params(tiny().config, abstract_tiny(), open_safetensors(place))


def safetensors(home: Path) -> Prepare:
    """A model's `model.safetensors`."""
    valid = _model_files(home)["one/model.safetensors"]

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, model__safetensors=_harmed_safetensors(random, valid))
        return lambda: _read_model(place)

    return prepare


def index(home: Path) -> Prepare:
    """`model.safetensors.index.json`, with its shards."""
    files = {name.partition("/")[2]: raw for name, raw in _model_files(home).items() if name.startswith("many/")}
    listed = json.loads(files.pop(INDEX))

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, **files)
        (place / INDEX).write_bytes(write(random, harm(random, listed)))
        return lambda: _read_model(place)

    return prepare


def config(home: Path) -> Prepare:
    """A model's `config.json`. One in twenty models is loaded."""
    files = _model_files(home)
    raw = json.loads(files["one/config.json"])
    seeds = [
        raw,
        raw | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        raw | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
        raw | {"model_type": "mistral", "sliding_window": 16},
        raw | {"model_type": "sborax_llama", "layer_sizes": [[2, 1, 12], [2, 1, 12]]},
    ]  # fmt: skip

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, config__json=write(random, harm(random, random.choice(seeds))))
        put(place, model__safetensors=files["one/model.safetensors"])

        def run() -> Any:
            config = read_config(place)
            config.rope.inverse_frequencies(min(config.head_dim, 64))
            return load_model(place) if random.randrange(20) == 0 else config

        return run

    return prepare


@functools.lru_cache(64)
def shapes(config: LlamaConfig) -> Any:
    """`abstract`, with a cache."""
    return abstract(config)


def gguf(home: Path) -> Prepare:
    """A `.gguf` file: its config, tokenizer and tensors."""
    valid = describe()
    size = len(pack(valid)) - valid["size"]
    (home / "valid.gguf").write_bytes(pack(valid))
    usual = open_gguf(home / "valid.gguf").config()

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        if random.randrange(3):
            harmed = harm(random, valid)
            raw = pack(harmed if isinstance(harmed, dict) else {})
        else:
            raw = pack(valid)
            raw = harm_bytes(random, raw[:size], 2) + raw[size:]
        put(place, model__gguf=raw)

        def read() -> Any:
            file = open_gguf(place / "model.gguf")
            config = file.config()
            file.tokenizer()
            # The shapes of another config take a while.
            return load_params(config, shapes(config), file) if config == usual or random.randrange(30) == 0 else config

        return read

    return prepare


def beside(home: Path) -> Prepare:
    """`model.safetensors` together with an index, with or without its shards."""
    files = _model_files(home)
    single = files["one/model.safetensors"]
    shards = {name.partition("/")[2]: raw for name, raw in files.items() if name.startswith("many/model")}
    listed = json.loads(shards.pop(INDEX))

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        if random.randrange(4):
            put(place, model__safetensors=single if random.randrange(2) else _harmed_safetensors(random, single))
        put(place, **{name: raw for name, raw in shards.items() if random.randrange(20)})
        if random.randrange(6):
            (place / INDEX).write_bytes(write(random, listed if random.randrange(2) else harm(random, listed)))
        return lambda: _read_model(place)

    return prepare


def _device(file: Path) -> None:
    file.symlink_to(os.devnull if file.name < "c" else "/dev/zero")


def _socket(file: Path) -> None:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as bound:
        before = os.getcwd()
        os.chdir(file.parent)
        bound.bind(file.name)
        os.chdir(before)


NO_FILES: tuple[Callable[[Path], Any], ...] = (
    os.mkfifo, _device, _socket, Path.mkdir, lambda file: file.symlink_to(file),
    lambda file: file.symlink_to("nowhere"), lambda file: file.touch(mode=0), lambda file: file.write_bytes(b""),
)  # fmt: skip


def pipes(home: Path) -> Prepare:
    """Pipes, devices, sockets and folders in place of files."""
    save_hf(home / "whole", dataclasses.replace(tiny(), tokenizer=tokenizer()), tiny().params)
    _, adapters = sx.attach(jax.random.key(0), tiny().params, [("q_proj", sx.LoRA(rank=1))])
    save_adapter(home / "adapter", adapters)
    data = {
        "x.jsonl": b'{"q": 1, "a": 2}',
        "x.csv": b"q,a\n1,2\n",
        "x.txt": b"a",
        "x.json": b"[]",
        "x.gguf": pack(describe()),
    }
    config = tiny().config
    assert isinstance(config, LlamaConfig)
    wide = dataclasses.replace(config, vocab_size=258)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract(wide))
    save_hf(home / "wide", LanguageModel(Llama(wide), params, wide, tokenizer()), params)
    paths = [*(home / "wide").iterdir(), *(home / "adapter").iterdir()]
    files = {path.name: path.read_bytes() for path in paths} | data
    names = (
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "adapter_config.json",
        INDEX,
        METRICS,
    )
    calls: tuple[Callable[[Path], Any], ...] = (
        load_model,
        read_adapter,
        lambda place: load_peft(place, tiny()),
        lambda place: open_gguf(place / "x.gguf").config(),
        lambda place: Metrics(epath.Path(place), 2),
        lambda place: load_experiment(str(place)),
        *(lambda place, name=name: read_records(str(place / name)) for name in data if name != "x.gguf"),
    )

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        for name, raw in files.items():
            (place / name).write_bytes(raw)
        for name in random.sample([*files, *names], random.choice((0, 1, 1, 2, 3))):
            (place / name).unlink(missing_ok=True)
            random.choice(NO_FILES)(place / name)
        call = random.choice(calls)
        return lambda: call(place)

    return prepare


def sizes(home: Path) -> Prepare:
    """The numbers of a `config.json`, read by `sborax plan` and by a model that is loaded."""
    files = _model_files(home)
    raw = json.loads(files["one/config.json"])
    seeds = [raw, raw | {"model_type": "sborax_llama", "layer_sizes": [[2, 1, 12], [2, 1, 12]]}]
    keys = [key for key, value in raw.items() if type(value) is int]
    large = (
        0,
        1,
        2,
        3,
        64,
        255,
        4096,
        4097,
        65_535,
        65_536,
        2**17,
        2**26,
        2**30,
        2**31 - 2,
        2**31 - 1,
        2**31,
        2**40,
        -1,
    )

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        changed = dict(random.choice(seeds))
        for key in random.sample(keys, random.choice((1, 1, 2, 3, 5))):
            changed[key] = random.choice(large)
        if "layer_sizes" in changed and random.randrange(2):
            layers = random.choice((1, 2, 3, 16, 300, 5_000, 10**5))
            changed |= {"layer_sizes": [[2, 1, random.choice(large)]] * layers, "num_hidden_layers": layers}
        put(place, config__json=json.dumps(changed).encode(), model__safetensors=files["one/model.safetensors"])
        # Not the plan of a run, which compiles a program.
        return lambda: load_model(place) if random.randrange(3) else show(str(place / "config.json"))

    return prepare
