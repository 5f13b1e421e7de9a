"""For every reader: valid files to begin with, how they are harmed, and the call that must not go wrong."""

import functools
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import sborax as sx
from sborax.cli.plan import _sizes
from sborax.cli.targets import is_run
from sborax.config import encode, override
from sborax.data.samples import load_samples
from sborax.data.template import prompt_of
from sborax.interop import peft_load
from sborax.interop.peft_load import load_peft
from sborax.interop.peft_table import TABLE
from sborax.models import save_hf
from sborax.models.checkpoint import INDEX, load_params, open_safetensors
from sborax.models.config import LlamaConfig
from sborax.models.gguf import open_gguf
from sborax.models.language_model import LanguageModel, abstract
from sborax.models.llama import Llama
from sborax.models.load import load_model, read_config
from sborax.models.tokenizer import read_tokenizer
from sborax.paths import plan
from sborax.train.adapter import LEAVES, PLAN, fingerprint, load_adapter, read_adapter, save_adapter
from sborax.train.best import best_so_far
from sborax.train.experiment import CONFIG, load_experiment
from sborax.train.grid import Sweep, read_grid
from sborax.train.report import METRICS, Metrics
from sborax.train.results import SWEEP, check_same

from .gguf_file import describe, pack
from .mutations import RAW, TEXTS, harm, harm_bytes, harm_text, hostile, places, write

Prepare = Callable[[Random, Path], Callable[[], Any]]
"""Writes the files of a case into an empty directory, and returns the call to be tried."""

CHAT = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT_PIECES = (
    "{% for m in messages %}", "{% endfor %}", "{% if true %}", "{% endif %}", "{{", "}}", "{%", "%}", "{#", "| tojson",
    "{{ messages }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ range(10**9) }}", "{{ 9 ** 9 }}", "loop.index",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{% extends '../outside/x' %}", "{{ messages.append(1) }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% generation %}", "{% set x = namespace(a=1) %}",
    "{{ 'a' | center(1000) }}", "{{ lipsum() }}", "{{ cycler }}", "message['content']", "message.role", "\0", "\ud800",
)  # fmt: skip

CHAT_BLOCKS = (
    "{{ messages }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__ }}", "{{ 1 / 0 }}", "{{ x.y.z }}",
    "{{ raise_exception('no') }}", "{{ strftime_now('%Y') }}", "{{ range(10**9) }}", "{{ 9 ** 9 }}",
    "{{ messages[9] }}",
    "{% include '/etc/passwd' %}", "{% import 'x' as y %}", "{{ messages.append(1) }}", "{{ messages | tojson }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "{% generation %}a{% endgeneration %}",
    "{{ self._TemplateReference__context }}",
    "{% set x = namespace(a=1) %}{% set x.a = 'b' * 9 %}{{ x.a }}", "{{ 'a' | center(1000) }}",
    "{{ messages | map(attribute='role') | join }}", "{{ messages | sort }}",
    "{{ cycler('a').__init__.__globals__ }}", "{{ lipsum.__globals__['os'].system('touch x') }}", "{{ (1, 2) | sum }}",
    "{{ messages | first | attr('__class__') }}", "{{ dict(a=messages) | items | list }}", "{{ 'a' | int + 'b' }}",
    "{% for a in range(9) %}{% if a > 3 %}{% break %}{% endif %}{{ loop.index }}{% endfor %}", "{{ 'é\ud800' }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}", "{{ 'a'.format_map(messages[0]) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ 10 ** 5000 }}", "{{ 'x' | replace('x', 'y') | upper | wordcount }}", "{# a #}", "{{ [1, 2][5] }}",
    "{{ none.a }}", "{{ 1.5 | round }}",
)  # fmt: skip
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
)
"""These cost the whole time that a conversation has."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {
        letter: number
        for number, letter in enumerate(["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    bare = Tokenizer(models.BPE(vocabulary, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=CHAT
    )


@functools.cache
def tiny() -> LanguageModel:
    """A model of two layers, all ones."""
    config = LlamaConfig(16, 8, 12, 2, 2, 1, 4, 32, 1e-5)
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract(config))
    return LanguageModel(Llama(config), params, config, None)


def put(place: Path, **files: bytes) -> None:
    """Write files; `__` stands for a dot."""
    for name, content in files.items():
        (place / name.replace("__", ".")).write_bytes(content)


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
    """A sound file of other tensors: renamed, of other dtypes and shapes, lost, zeros or NaN."""
    header = {name: dict(one) for name, one in header.items() if name != "__metadata__"}
    for name in random.sample(sorted(header), min(len(header), random.choice((1, 1, 2, 3)))):
        one, kind = header[name], random.randrange(6)
        if kind == 0:
            header[random.choice((random.choice(TEXTS), f"{name}.x", name.replace("0", "7")))] = header.pop(name)
        elif kind == 1:
            del header[name]
        elif kind < 4:
            one["dtype"] = random.choice(list(BITS))
        else:
            shape = one["shape"]
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
            one["shape"] = random.choice(changed)
    made, parts, offset = {"__metadata__": {"format": random.choice(("pt", *TEXTS[:12]))}}, [], 0
    for name, one in header.items():
        size = math.prod(one["shape"]) * BITS[one["dtype"]] // 8
        made[name] = {**one, "data_offsets": [offset, offset + size]}
        parts.append((b"\xff" if random.randrange(20) == 0 else b"\0") * size)
        offset += size
    text = json.dumps(made).encode("utf-8", "replace")
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


@functools.cache
def abstract_tiny() -> Any:
    return abstract(tiny().config)


def safetensors(home: Path) -> Prepare:
    """A model's `model.safetensors`."""
    whole = _model_files(home)["one/model.safetensors"]

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, model__safetensors=_harmed_safetensors(random, whole))
        return lambda: _read_model(place)

    return prepare


def index(home: Path) -> Prepare:
    """`model.safetensors.index.json`, its shards beside it."""
    files = {name.partition("/")[2]: raw for name, raw in _model_files(home).items() if name.startswith("many/")}
    listed = json.loads(files.pop(INDEX))
    listed["weight_map"] = dict(list(listed["weight_map"].items())[:])

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, **files)
        (place / INDEX).write_bytes(write(random, harm(random, listed)))
        return lambda: _read_model(place)

    return prepare


def config(home: Path) -> Prepare:
    """A model's `config.json`; one in twenty that are read is loaded with it."""
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
            found = read_config(place)
            found.rope.inverse_frequencies(min(found.head_dim, 64))
            return load_model(place) if random.randrange(20) == 0 else found

        return run

    return prepare


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


@functools.cache
def experiment() -> sx.Experiment:
    """One with something in every field."""
    return sx.Experiment(
        model="tiny",
        data=sx.Data(name="data.jsonl", template="Q: {q}\nA: ", answer="{a}", buckets=(16, 32)),
        rules=(
            sx.Rule(r"self_attn/(q|v)_proj", sx.LoRA(rank=2, alpha=4.0), layers=slice(0, 1)),
            sx.Rule(r"mlp/", sx.add(sx.SBoRA(rank=2), sx.LoRA(rank=1)), layers=(1,)),
            sx.Rule(r"lm_head", None),
            sx.Rule(r"o_proj", sx.chain(sx.LoRA(rank=2), sx.DoRA())),
        ),
        optimizer=sx.Optimizer(lr=1e-3, betas=(0.9, 0.99)),
        steps=4,
        mesh={"fsdp": 1},
        eval=sx.Eval(data=sx.Data(name="held.jsonl"), every=2),
        save=sx.Save(best=True),
    )


def run(home: Path) -> Prepare:
    """A run's `config.json`, and the plan that its rules make."""
    seed = encode(experiment())

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        put(place, config__json=write(random, harm(random, seed)))

        def read() -> Any:
            is_run(str(place))
            found = load_experiment(str(place / CONFIG) if random.randrange(2) else str(place))
            return plan(abstract_tiny(), found.rules)

        return read

    return prepare


def overrides(home: Path) -> Prepare:
    """`key=value` of `sborax train` and `sborax sweep`."""
    raw = encode(experiment())
    keys = [".".join(map(str, place)) for place in places(raw)]

    def word(random: Random) -> str:
        key = random.choice(keys)
        place = tuple(int(part) if part.isdecimal() else part for part in key.split(".")) if key else ()
        value = raw
        for part in place:
            value = value[part]
        if random.randrange(6) == 0:
            key = harm_text(random, key, (*TEXTS, *keys, ".", "*", "=", "[0]"))
        kind = random.randrange(6)
        if kind == 0:
            return f"{key}={random.choice((*TEXTS, *RAW.values()))}"
        if kind == 1:
            return f"{key}={harm(random, value)!r}"
        text = write(random, harm(random, value)).decode("utf-8", "replace")
        if kind == 2:
            return f"{key}={text},{json.dumps(value)}"
        return f"{key}={text}" if kind < 5 else harm_text(random, f"{key}={text}", TEXTS)

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        words = [word(random) for _ in range(random.choice((1, 1, 2, 3)))]

        def read() -> Any:
            if random.randrange(2):
                return override(experiment(), words)
            changes, grid = read_grid(words)
            changed = override(experiment(), ["save.best=false", "mesh=null", *changes])
            return Sweep(changed, grid or {"optimizer.lr": (1e-3, 1e-4)}).members()

        return read

    return prepare


@functools.lru_cache(64)
def shapes(own: LlamaConfig) -> Any:
    """`abstract` of the configs met lately."""
    return abstract(own)


def gguf(home: Path) -> Prepare:
    """A `.gguf` file: config, tokenizer, every tensor."""
    whole = describe()
    size = len(pack(whole)) - whole["size"]
    (home / "sound.gguf").write_bytes(pack(whole))
    sound = open_gguf(home / "sound.gguf").config()

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        if random.randrange(3):
            made = harm(random, whole)
            raw = pack(made if isinstance(made, dict) else {})
        else:
            raw = pack(whole)
            raw = harm_bytes(random, raw[:size], 2) + raw[size:]
        put(place, model__gguf=raw)

        def read() -> Any:
            found = open_gguf(place / "model.gguf")
            own = found.config()
            found.tokenizer()
            # The shapes of another config take a while.
            usual = own == sound
            return load_params(own, shapes(own), found) if usual or random.randrange(30) == 0 else own

        return read

    return prepare


RECORDS = [
    {"instruction": "What is two and two?", "input": "", "output": "Four."},
    {"q": "A?", "a": "B.", "n": 3, "x": 1.5, "none": None},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"text": "Once upon a time."},
]


def jsonl(home: Path) -> Prepare:
    """A `.jsonl` or `.json` file of records, through every template."""
    templates = ("alpaca", "chat", "text", "{q}: {n}", "llm_adapters")
    fitting = {"alpaca": 0, "llm_adapters": 0, "chat": 2, "text": 3, "{q}: {n}": 1}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        template = random.choice(templates)
        record = RECORDS[fitting[template] if random.randrange(8) else random.randrange(4)]
        records = [record, harm(random, record), record]
        name = random.choice(("data.jsonl", "data.jsonl", "data.json", "lines.json"))
        lines = [write(random, one) for one in records]
        raw = b"[" + b",".join(lines) + b"]" if name == "data.json" else b"\n".join(lines)
        (place / name).write_bytes(harm_bytes(random, raw) if random.randrange(8) == 0 else raw)
        if random.randrange(8) == 0:
            template = harm_text(random, template, (*TEXTS[:22], *record))
        overlong = random.choice(("drop", "truncate", "split"))

        def read() -> Any:
            data = sx.Data(str(place / name), template, "{a}", max_length=64, overlong=overlong)
            return load_samples(data, tokenizer(), 1, 128)

        return read

    return prepare


def tokenizers(home: Path) -> Prepare:
    """`tokenizer.json`, `tokenizer_config.json` and their company."""
    tokenizer().save_pretrained(str(home / "tokenizer"))
    whole = json.loads((home / "tokenizer" / "tokenizer.json").read_text())
    # A small vocabulary: most of what is harmed shall be something else.
    few = list(whole["model"]["vocab"])[:40]
    whole["model"]["vocab"] = {letter: number for number, letter in enumerate(few)}
    about = json.loads((home / "tokenizer" / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    named = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "lstrip": False}}
    keys = (
        "fast_tokenizer_files",
        "gguf_file",
        "init_inputs",
        "vocab_file",
        "auto_map",
        "tokenizer_file",
        "merges_file",
    )

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        which, files = random.randrange(4), {"json": whole, "config": about, "map": named}
        name = ("json", "json", "config", "map")[which]
        files[name] = harm(random, files[name])
        if name == "config" and random.randrange(3) == 0 and isinstance(files[name], dict):
            files[name][random.choice(keys)] = random.choice((["../outside/tokenizer.9.9.9.json"], hostile(random)))
        if which == 3:
            files["config"] = {name: value for name, value in about.items() if name != "added_tokens_decoder"}
            put(place, special_tokens_map__json=write(random, files["map"]))
        put(place, tokenizer__json=write(random, files["json"]), tokenizer_config__json=write(random, files["config"]))

        def read() -> Any:
            found = read_tokenizer(place)
            return found if found is None else found("Two and 2 é.")["input_ids"]

        return read

    return prepare


def templates(home: Path) -> Prepare:
    """Chat templates."""
    bare = tokenizer().backend_tokenizer
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        text = harm_text(random, CHAT, (*CHAT_PIECES, *TEXTS[:20]))
        if random.randrange(3):
            parts = CHAT.split("<")
            for _ in range(random.choice((1, 1, 2))):
                block = random.choice(CHAT_BLOCKS if random.randrange(1_000) else ENDLESS)
                parts.insert(random.randrange(len(parts) + 1), block)
            text = "<".join(parts)
        made = PreTrainedTokenizerFast(tokenizer_object=bare, bos_token="<|im_start|>", chat_template=text)
        put(place, data__jsonl=json.dumps(chat).encode())
        data = sx.Data(str(place / "data.jsonl"), "chat", max_length=64)
        return lambda: (prompt_of("chat", chat, made), load_samples(data, made, 1, 128))

    return prepare


def meshes(home: Path) -> Prepare:
    """`sborax plan --mesh`."""

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        text = harm_text(random, "fsdp=8,tensor=2,data=4,slices=2", (*TEXTS, "²", "٣", "=", ",", "9" * 5_000))
        return lambda: _sizes(text)

    return prepare


def leftovers(home: Path) -> Prepare:
    """What a run or a sweep finds when it goes on: `sweep.json`, `metrics.jsonl`, `best/plan.json`."""
    members = Sweep(override(experiment(), ["save.best=false", "mesh=null"]), {"optimizer.lr": (1e-3, 1e-4)}).members()
    listed = {"members": [{"name": one.name, "changes": list(one.changes)} for one in members]}
    lines = [{"step": step, "loss": 2.0, "eval_loss": 1.5} for step in range(1, 5)]
    about = {"format": 1, "rules": [], "sites": [], "trained_base": [], "base": {}, "eval_loss": 1.0, "eval_data": {}}

    def prepare(random: Random, place: Path) -> Callable[[], Any]:
        (place / SWEEP).write_bytes(write(random, harm(random, listed)))
        (place / METRICS).write_bytes(b"\n".join(write(random, harm(random, line)) for line in lines))
        (place / "best").mkdir()
        (place / "best" / PLAN).write_bytes(write(random, harm(random, about)))
        (place / "best" / LEAVES).write_bytes(struct.pack("<Q", 2) + b"{}")
        which = random.randrange(3)

        def read() -> Any:
            if which == 0:
                return check_same(epath.Path(place), members)
            if which == 1:
                found = Metrics(epath.Path(place), 3)
                return found.losses(), found.eval_loss()
            return best_so_far(epath.Path(place), {}, lambda line: None)

        return read

    return prepare


READERS: dict[str, Callable[[Path], Prepare]] = {
    "safetensors": safetensors, "index": index, "config": config, "peft": peft, "adapter": adapter, "run": run,
    "overrides": overrides, "gguf": gguf, "jsonl": jsonl, "tokenizer": tokenizers, "template": templates,
    "mesh": meshes, "leftovers": leftovers,
}  # fmt: skip
