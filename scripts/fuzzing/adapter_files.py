"""Adapter files of PEFT and of sborax."""

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
            config = kind | target | {"bias": "none", "base_model_name_or_path": "x", "modules_to_save": None}
            seeds.append((config, _peft_tensors(config, model)))
    return seeds


def _peft_tensors(config: Any, model: LanguageModel) -> bytes:
    """A safetensors file with the tensors that the reader expects for an unharmed config."""
    from safetensors.numpy import save

    layout, is_bone = peft_load.layout_of(model.params), config["peft_type"] == "BONE"
    settled = config | {"peft_type": "MISS"} if is_bone else config
    row = peft_load.row_for(settled)
    fits = peft_load._fits(row, settled, peft_load._targets(settled, layout), layout)
    indices = tuple(tensor.suffix for tensor in row.tensors if tensor.places)
    tensors = {}
    for name, shape in peft_load._expected(row, fits, layout).items():
        stored = name.replace(".miss_", ".bone_") if is_bone else name
        if name.endswith(indices):
            tensors[stored] = np.arange(math.prod(shape), dtype=np.int32).reshape(shape) % 8
        else:
            tensors[stored] = np.full(shape, 0.5, np.float32)
    return save(tensors)


def _cached(fit: Callable[..., Any]) -> Callable[..., Any]:
    """`fit_plan` with a cache by plan, for one key and one base."""
    results: dict[Any, Any] = {}

    def cached_fit(key: Any, params: Any, plan: Any) -> Any:
        if plan not in results:
            results[plan] = fit(key, params, plan)
        return results[plan]

    return cached_fit


def peft(home: Path) -> Prepare:
    """A PEFT adapter directory."""
    seeds = _peft_seeds(home)
    # Drawing and compiling for a plan is slow, and not what these cases try.
    quick = {
        "fit_plan": _cached(peft_load.fit_plan),
        "leaf_shapes": functools.lru_cache(4096)(peft_load.leaf_shapes),
    }
    extra = sorted({name for row in TABLE for name in (*row.defaults, *row.reads, *row.known_by)})

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        config, tensors = random.choice(seeds)
        if random.randrange(4) == 0:
            tensors = _harmed_safetensors(random, tensors)
        else:
            config = harm(random, config)
            if isinstance(config, dict) and random.randrange(8) == 0:
                config[random.choice(extra)] = hostile(random)
        put(place, adapter_config__json=write(random, config), adapter_model__safetensors=tensors)

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
        _, adapters = sx.attach(jax.random.key(0), params, rules)
        trained = {"norm/scale": params["norm"]["scale"]} if number == 0 else {}
        saved, about = home / f"adapter{number}", {"eval_loss": 1.0}
        save_adapter(saved, adapters, rules=rules, base=fingerprint(params), trained_base=trained, about=about)
        seeds.append((json.loads((saved / PLAN).read_text()), (saved / LEAVES).read_bytes()))

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        # The last adapter rewrites its base, which is slow.
        plan, leaves = random.choice(seeds[:-1] if random.randrange(50) else seeds)
        if random.randrange(4):
            # As in older files: digests would stop every harmed leaf before the checks behind them.
            plan = {name: value for name, value in plan.items() if name != "digests"}
        if random.randrange(4) == 0:
            leaves = _harmed_safetensors(random, leaves)
        else:
            plan = harm(random, plan)
        put(place, plan__json=write(random, plan), adapter__safetensors=leaves)
        read = read_adapter if random.randrange(3) else lambda directory: load_adapter(directory, params)
        return lambda: read(place)

    return prepare
