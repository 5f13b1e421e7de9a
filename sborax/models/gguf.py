"""Models in llama.cpp's GGUF format, dequantised."""

import dataclasses
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sborax.core import SboraxError
from sborax.models.checkpoint import AbstractTensors
from sborax.models.config import LlamaConfig, Rope
from sborax.models.families import FAMILIES, Family
from sborax.models.names import Row

KNOWN = frozenset(
    """
    block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base
    rope.scaling.type rope.scaling.factor vocab_size
    """.split()
)
"""Fields of an architecture that `config` reads; any other may change the model."""
ARCHITECTURES = {family.gguf: model_type for model_type, family in FAMILIES.items() if family.gguf}
"""llama.cpp's name -> ours."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False),),
    "smollm": (pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": (
        pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
    "qwen2": (
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ),
}
"""By `tokenizer.ggml.pre`: how text is cut before byte-pair merging."""
NORMALIZERS = {"qwen2": normalizers.NFC()}
"""By the same: what is done to text before that."""
CONTROL, USER_DEFINED = 3, 4
"""Token types whose text is matched whole."""


@dataclasses.dataclass(frozen=True)
class GGUF(AbstractTensors):
    """An opened GGUF file of an architecture in `ARCHITECTURES`."""

    where: str
    architecture: str
    reader: gguf.GGUFReader
    tensors: dict[str, gguf.ReaderTensor]

    def names(self) -> frozenset[str]:
        """Every tensor."""
        return frozenset(self.tensors)

    def name(self, entry: Row) -> str:
        """llama.cpp's name."""
        return entry.gguf

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in Hugging Face's order of rows."""
        tensor = self.tensors[name]
        try:
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as failure:
            raise SboraxError(f"{self.where}: {name} has type {tensor.tensor_type.name}, not supported") from failure
        heads = {"attn_q": self._own("attention.head_count"), "attn_k": self._kv_heads()}
        part = name.split(".")[-2]
        if part not in heads or not self.family.interleaved:
            return dense
        # Hugging Face turns halves of a head together.
        pairs = dense.reshape(heads[part], dense.shape[0] // heads[part] // 2, 2, *dense.shape[1:])
        return pairs.swapaxes(1, 2).reshape(dense.shape)

    def config(self) -> LlamaConfig:
        """The config that the file's metadata states.

        Raises SboraxError for another architecture and for fields that this model does not implement.
        """
        prefix = f"{self.architecture}."
        fields = {key.removeprefix(prefix) for key in self.reader.fields if key.startswith(prefix)}
        if unknown := sorted(fields - KNOWN):
            raise SboraxError(f"{self.where}: field '{prefix}{unknown[0]}' is not supported")
        heads, width = self._own("attention.head_count"), self._own("embedding_length")
        head_dim = self._own("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._own(key, head_dim) != head_dim:
                raise SboraxError(f"{self.where}: {prefix}{key} differs from the head width {head_dim}; not supported")
        scaling = self._own("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise SboraxError(f"{self.where}: rope scaling {scaling!r} is not supported from GGUF")
        linear = scaling == "linear"
        factor = _short(self._own("rope.scaling.factor")) if linear else 1.0
        bos, eos, pad = (self.field(f"tokenizer.ggml.{key}_token_id", None) for key in ("bos", "eos", "padding"))
        return LlamaConfig(
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            hidden_size=width,
            intermediate_size=self._own("feed_forward_length"),
            num_hidden_layers=self._own("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=self._kv_heads(),
            head_dim=head_dim,
            max_position_embeddings=self._own("context_length"),
            rms_norm_eps=_short(self._own("attention.layer_norm_rms_epsilon")),
            rope=Rope(_short(self._own("rope.freq_base", 10_000.0)), "linear" if linear else "default", factor),
            tie_word_embeddings="output.weight" not in self.tensors,
            attention_bias="blk.0.attn_output.bias" in self.tensors,
            mlp_bias="blk.0.ffn_up.bias" in self.tensors,
            model_type=ARCHITECTURES[self.architecture],
            bos_token_id=bos,
            eos_token_id=() if eos is None else (eos,),
            pad_token_id=pad,
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The byte-level BPE tokenizer in the file, with its chat template.

        Raises SboraxError for another kind of tokenizer.
        """
        kind, cut = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or cut not in PRE_TOKENIZERS:
            raise SboraxError(f"{self.where}: tokenizer {kind}/{cut} is not supported; use the Hugging Face directory")
        texts, types = self.field("tokenizer.ggml.tokens"), self.field("tokenizer.ggml.token_type")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        vocab = {text: number for number, text in enumerate(texts)}
        # Llama 3 takes a whole word that is a token as it is, before any merge.
        made = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
        if cut in NORMALIZERS:
            made.normalizer = NORMALIZERS[cut]
        made.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[cut]))
        made.decoder = decoders.ByteLevel()
        for text, type_ in zip(texts, types, strict=True):
            if type_ in (CONTROL, USER_DEFINED):
                made.add_tokens([AddedToken(text, normalized=False, special=type_ == CONTROL)])
        special = {
            f"{role}_token": texts[self.field(f"tokenizer.ggml.{key}_token_id")]
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if self._has(key)
        }
        if self.field("tokenizer.ggml.add_bos_token", False):
            bos = special["bos_token"]
            made.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            chat_template=self.field("tokenizer.chat_template", None),
            model_max_length=self._own("context_length"),
            clean_up_tokenization_spaces=False,
            **special,
        )

    @property
    def family(self) -> Family:
        """The row of its models."""
        return FAMILIES[ARCHITECTURES[self.architecture]]

    def _own(self, key: str, *default: Any) -> Any:
        """A field of the architecture."""
        return self.field(f"{self.architecture}.{key}", *default)

    def _has(self, role: str) -> bool:
        return f"tokenizer.ggml.{role}_token_id" in self.reader.fields

    def _kv_heads(self) -> int:
        return self._own("attention.head_count_kv", self._own("attention.head_count"))

    def field(self, key: str, *default: Any) -> Any:
        """One metadata value, or the default; SboraxError if there is neither."""
        found = self.reader.fields.get(key)
        if found is not None:
            return found.contents()
        if default:
            return default[0]
        raise SboraxError(f"{self.where}: field {key!r} is missing")


def _short(number: float) -> float:
    """A float32 as the decimal that was meant: 9.99999975e-06 -> 1e-05."""
    return float(str(np.float32(number)))


def open_gguf(file: Path) -> GGUF:
    """A GGUF file, its tensors still on disk.

    Raises SboraxError for a file that is truncated or of another architecture.
    """
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, struct.error) as failure:
        raise SboraxError(f"{file}: not a readable GGUF file ({failure}); fetch it again") from failure
    name = reader.fields.get("general.architecture")
    kind = None if name is None else name.contents()
    if kind not in ARCHITECTURES:
        raise SboraxError(f"{file}: architecture {kind!r} is not supported; known: {', '.join(ARCHITECTURES)}")
    return GGUF(str(file), str(kind), reader, {tensor.name: tensor for tensor in reader.tensors})
