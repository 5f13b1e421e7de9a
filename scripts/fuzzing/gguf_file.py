"""GGUF files from a description in JSON, so that every number in them can be wrong."""

import struct
from typing import Any

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q8_0 = 0, 1, 8
_INTS = {
    UINT8: "B",
    INT8: "B",
    UINT16: "H",
    INT16: "H",
    UINT32: "I",
    INT32: "I",
    BOOL: "B",
    UINT64: "Q",
    INT64: "Q",
}
_FLOATS = {FLOAT32: "f", FLOAT64: "d"}
LETTERS = ["<s>", *"abcdefgh", "Ġ", "ab", "cd", *(f"<{i}>" for i in range(20))]


def describe() -> dict[str, Any]:
    """A LLaMA of one layer, width 32, with a byte-pair tokenizer of 32 tokens."""
    fields: list[list[Any]] = [
        ["general.architecture", STRING, "llama"],
        ["general.alignment", UINT32, 32],
        ["llama.block_count", UINT32, 1],
        ["llama.context_length", UINT32, 64],
        ["llama.embedding_length", UINT32, 32],
        ["llama.feed_forward_length", UINT32, 32],
        ["llama.attention.head_count", UINT32, 2],
        ["llama.attention.head_count_kv", UINT32, 1],
        ["llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5],
        ["llama.rope.freq_base", FLOAT32, 10_000.0],
        ["llama.rope.dimension_count", UINT32, 16],
        ["llama.vocab_size", UINT32, 32],
        ["tokenizer.ggml.model", STRING, "gpt2"],
        ["tokenizer.ggml.pre", STRING, "gpt-2"],
        ["tokenizer.ggml.tokens", ARRAY, [STRING, LETTERS]],
        ["tokenizer.ggml.token_type", ARRAY, [INT32, [3, *[1] * 31]]],
        ["tokenizer.ggml.merges", ARRAY, [STRING, ["a b", "c d"]]],
        ["tokenizer.ggml.bos_token_id", UINT32, 0],
        ["tokenizer.ggml.eos_token_id", UINT32, 1],
        ["tokenizer.ggml.add_bos_token", BOOL, 1],
        ["tokenizer.chat_template", STRING, "{% for m in messages %}{{ m['content'] }}{% endfor %}"],
    ]
    shapes = {
        "token_embd.weight": [32, 32], "output_norm.weight": [32], "blk.0.attn_norm.weight": [32],
        "blk.0.ffn_norm.weight": [32], "blk.0.attn_q.weight": [32, 32], "blk.0.attn_k.weight": [32, 16],
        "blk.0.attn_v.weight": [32, 16], "blk.0.attn_output.weight": [32, 32], "blk.0.ffn_gate.weight": [32, 32],
        "blk.0.ffn_up.weight": [32, 32], "blk.0.ffn_down.weight": [32, 32],
    }  # fmt: skip
    kinds = {"token_embd.weight": F16, "blk.0.ffn_up.weight": Q8_0}
    tensors, offset = [], 0
    for name, shape in shapes.items():
        kind = kinds.get(name, F32)
        tensors.append([name, len(shape), shape, kind, offset])
        count = shape[0] * (shape[1] if len(shape) > 1 else 1)
        offset += {F32: 4 * count, F16: 2 * count, Q8_0: count // 32 * 34}[kind] + 31 & ~31
    return {
        "magic": 0x46554747, "version": 3, "counts": [len(tensors), len(fields)], "fields": fields,
        "tensors": tensors, "size": offset,
    }  # fmt: skip


def pack(file: Any) -> bytes:
    """The bytes of a description. A value that does not fit its type is converted."""
    parts = [_number("I", file.get("magic")), _number("I", file.get("version"))]
    parts += [_number("Q", count) for count in _list(file.get("counts"))]
    for field in _list(file.get("fields")):
        name, kind, value = (*_list(field), None, None, None)[:3]
        parts += [_text(name), _number("I", kind), _value(kind, value)]
    for tensor in _list(file.get("tensors")):
        name, count, shape, kind, offset = (*_list(tensor), *(None,) * 5)[:5]
        parts += [_text(name), _number("I", count), *(_number("Q", size) for size in _list(shape))]
        parts += [_number("I", kind), _number("Q", offset)]
    head = b"".join(parts)
    size = file.get("size")
    return head + bytes(-len(head) % 32) + bytes(size if isinstance(size, int) and 0 <= size < 1 << 16 else 64)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _number(form: str, value: Any) -> bytes:
    if isinstance(value, float):
        return struct.pack("<d", value)[: struct.calcsize(form)]
    integer = value if isinstance(value, int) else 0
    return struct.pack(f"<{form}", integer % (1 << 8 * struct.calcsize(form)))


def _text(value: Any) -> bytes:
    raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b"x"
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: Any, value: Any) -> bytes:
    kind = kind if isinstance(kind, int) else UINT32
    if kind == ARRAY and isinstance(value, list):
        inner, items = (*value, None, None)[:2]
        return _number("I", inner) + _number("Q", len(_list(items))) + b"".join(_value(inner, x) for x in _list(items))
    if isinstance(value, str) or kind == STRING:
        return _text(value)
    if kind in _FLOATS:
        real = value if isinstance(value, (int, float)) and abs(value) < 1e38 else 1e-5
        return struct.pack(f"<{_FLOATS[kind]}", real)
    return _number(_INTS.get(kind, "I"), value)
