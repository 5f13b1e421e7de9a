"""Files of adapters: PEFT's and ours."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import jax
import numpy as np

import sborax as sx
from sborax.interop import peft_load
from sborax.interop.peft_load import load_peft
from sborax.interop.peft_table import TABLE
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import LEAVES, PLAN, fingerprint, load_adapter, read_adapter, save_adapter

from .model_files import _harmed_safetensors
from .mutations import harm, hostile, write
from .seeds import Prepare, put, tiny


def _peft_seeds(home: Path) -> list[tuple[Any, bytes]]:
    model, seeds = tiny(), []
    wide = {"rank_pattern": {r".*\.1\.self_attn\.q_proj": 3, "v_proj": 1}, "alpha_pattern": {"v_proj": 4}}
    targets = [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ["layers.0.self_attn.v_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ]
    kinds = ({"peft_type": "LORA", "r": 2, "lora_alpha": 3, **wide}, {"peft_type": "LORA", "r": 2, "use_dora": True},
             {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}, {"peft_type": "MISS", "r": 2},
             {"peft_type": "BONE", "r": 2}, {"peft_type": "VERA", "r": 2}, {"peft_type": "OFT", "oft_block_size": 4,
             "use_cayley_neumann": False}, {"peft_type": "IA3", "feedforward_modules": ["v_proj"]},
             {"peft_type": "ADALORA", "init_r": 2, "rank_pattern": {}}, {"peft_type": "SHIRA", "r": 2})  # fmt: skip
    for kind in kinds:
        for target in targets:
            given = kind | target | {"bias": "none", "base_model_name_or_path": "x", "modules_to_save": None}
            seeds.append((given, _peft_tensors(given, model)))
    return seeds


def _peft_tensors(given: Any, model: LanguageModel) -> bytes:
    """The tensors that a config asks for, from the shapes that the reader itself expects of the unharmed config."""
    from safetensors.numpy import save

    own = peft_load
    layout = own.layout_of(model.params)
    settled = given if given["peft_type"] != "BONE" else given | {"peft_type": "MISS"}
    row = own.row_for(settled)
    fits = {module: own._fit(row, settled, module) for module in own._targets(settled, layout)}
    wanted = own._expected(row, fits, layout)
    kinds = {tensor.suffix for tensor in row.tensors if tensor.places}
    old = {name.replace(".miss_", ".bone_") if given["peft_type"] == "BONE" else name: name for name in wanted}
    tensors = {}
    for stored, name in old.items():
        places_ = any(name.endswith(suffix) for suffix in kinds)
        tensors[stored] = (
            np.arange(math.prod(wanted[name]), dtype=np.int32).reshape(wanted[name]) % 8
            if places_
            else np.full(wanted[name], 0.5, np.float32)
        )
    return save(tensors)


def _remembered(attach: Callable[..., Any]) -> Callable[..., Any]:
    made: dict[Any, Any] = {}

    def once(key: Any, params: Any, plan: Any) -> Any:
        if plan not in made:
            made[plan] = attach(key, params, plan)
        return made[plan]

    return once


def peft(home: Path) -> Prepare:
    """A PEFT adapter directory."""
    seeds = _peft_seeds(home)
    # What is drawn and compiled for a plan is not what is tried here.
    quick = {
        "attach": _remembered(peft_load.attach),
        "leaf_shapes": functools.lru_cache(4096)(peft_load.leaf_shapes),
    }
    extra = sorted({name for row in TABLE for name in (*row.defaults, *row.reads, *row.known_by)})

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        given, tensors = random.choice(seeds)
        if random.randrange(4) == 0:
            tensors = _harmed_safetensors(random, tensors)
        else:
            given = harm(random, given)
            if isinstance(given, dict) and random.randrange(8) == 0:
                given[random.choice(extra)] = hostile(random)
        put(place, adapter_config__json=write(random, given), adapter_model__safetensors=tensors)

        def read() -> Any:
            with mock.patch.multiple(peft_load, **quick):
                return load_peft(place, tiny())

        return read

    return prepare


def adapter(home: Path) -> Prepare:
    """`plan.json` and `adapter.safetensors` of a run."""
    params = tiny().params
    seeds = []
    for number, rules in enumerate(
        (
            [("mlp", sx.LoRA(rank=3, dropout=0.1)), ("attn", sx.SBoRA(rank=4))],
            [("mlp", sx.Bone(rank=4)), ("attn", sx.DoRA(rank=2))],
            [sx.Rule("mlp", sx.VeRA(rank=3), layers=(0,)), sx.Rule("mlp", sx.LoRA(rank=2))],
            [("up_proj", sx.add(sx.LoRA(rank=1), sx.LoHa(rank=2))), ("attn", sx.scale(sx.LoRA(rank=1), 0.5))],
            [("q_proj", sx.PiSSA(rank=2))],
        )
    ):
        _, made = sx.attach(jax.random.key(0), params, rules)
        trained = {"norm/scale": params["norm"]["scale"]} if number == 0 else {}
        own = home / f"adapter{number}"
        save_adapter(own, made, rules=rules, base=fingerprint(params), trained_base=trained, about={"eval_loss": 1.0})
        seeds.append((json.loads((own / PLAN).read_text()), (own / LEAVES).read_bytes()))

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        # The last one has its base rewritten, which takes long.
        given, leaves = random.choice(seeds[:-1] if random.randrange(50) else seeds)
        if random.randrange(4):
            # As files were written before: with digests, no harmed leaf would reach what is behind them.
            given = {name: value for name, value in given.items() if name != "digests"}
        if random.randrange(4) == 0:
            leaves = _harmed_safetensors(random, leaves)
        else:
            given = harm(random, given)
        put(place, plan__json=write(random, given), adapter__safetensors=leaves)
        read = read_adapter if random.randrange(3) else lambda found: load_adapter(found, params)
        return lambda: read(place)

    return prepare
