"""Models in llama.cpp's GGUF format, dequantised."""

import dataclasses
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from sborax.adapters.core import SboraxError
from sborax.config.documents import shown
from sborax.models.checkpoint import AbstractTensors
from sborax.models.config import LlamaConfig
from sborax.models.families import FAMILIES, Family
from sborax.models.gguf_header import check_header
from sborax.models.names import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KNOWN = frozenset(
    """
    block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
    attention.key_length attention.value_length attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base
    rope.scaling.type rope.scaling.factor vocab_size
    """.split()
)
"""Fields of an architecture that `config` reads. Other fields may change the model, so they are refused."""
ARCHITECTURES = {family.gguf: model_type for model_type, family in FAMILIES.items() if family.gguf}
"""`model_type` by llama.cpp's name of the architecture."""

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
"""How text is cut before byte-pair merging, by `tokenizer.ggml.pre`."""
NORMALIZERS = {"qwen2": normalizers.NFC()}
"""How text is normalised before it is cut, by `tokenizer.ggml.pre`."""
BEGINNING = ("llama-bpe",)
"""Values of `tokenizer.ggml.pre` with which a text begins with a token where the file does not say, as in llama.cpp."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens whose text is never cut."""


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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header, which is within the bounds of the file."""
        return tuple(int(size) for size in self.tensors[name].shape[::-1])

    def read(self, name: str) -> np.ndarray:
        """One tensor, dequantised to float32, in Hugging Face's order of rows."""
        tensor = self.tensors[name]
        try:
            dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as failure:
            raise SboraxError(f"{self.where}: {name} has type {tensor.tensor_type.name}, not supported") from failure
        heads = {"attn_q": self._architecture_field("attention.head_count"), "attn_k": self._kv_heads()}
        part = name.split(".")[-2]
        if part not in heads or not self.family.interleaved:
            return dense
        # Hugging Face rotates the halves of a head together.
        pairs = dense.reshape(heads[part], dense.shape[0] // heads[part] // 2, 2, *dense.shape[1:])
        return pairs.swapaxes(1, 2).reshape(dense.shape)

    def config(self) -> LlamaConfig:
        """The config, from the file's metadata.

        Raises SboraxError for another architecture and for fields that this model does not implement.
        """
        prefix = f"{self.architecture}."
        fields = {key.removeprefix(prefix) for key in self.reader.fields if key.startswith(prefix)}
        if unknown := sorted(fields - KNOWN):
            raise SboraxError(f"{self.where}: field '{prefix}{unknown[0]}' is not supported")
        heads = self._architecture_field("attention.head_count")
        # The defaults are llama.cpp's: a factor alone scales linearly, and one of 0 stands for none.
        scaling = self._architecture_field("rope.scaling.type", "linear")
        if scaling not in ("none", "linear"):
            raise SboraxError(f"{self.where}: rope scaling {shown(scaling)} is not supported from GGUF")
        factor = _short(self._architecture_field("rope.scaling.factor", 0.0))
        is_scaled = scaling == "linear" and factor != 0
        table = self.tensors.get("token_embd.weight")
        if table is None or len(table.shape) != 2:
            raise SboraxError(f"{self.where}: has no matrix 'token_embd.weight'")
        bos, eos, pad = (self.field(f"tokenizer.ggml.{key}_token_id", None) for key in ("bos", "eos", "padding"))
        biases = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_up.bias"}
        raw = {
            "model_type": ARCHITECTURES[self.architecture],
            "vocab_size": int(table.shape[1]),
            "hidden_size": self._architecture_field("embedding_length"),
            "intermediate_size": self._architecture_field("feed_forward_length"),
            "num_hidden_layers": self._architecture_field("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._architecture_field("attention.head_count_kv", heads),
            "head_dim": self._architecture_field("attention.key_length", None),
            "max_position_embeddings": self._architecture_field("context_length"),
            "rms_norm_eps": _short(self._architecture_field("attention.layer_norm_rms_epsilon")),
            "rope_theta": _short(self._architecture_field("rope.freq_base", 10_000.0)),
            "rope_scaling": {"rope_type": "linear", "factor": factor} if is_scaled else None,
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **{key: True for key, name in biases.items() if name in self.tensors},
            "bos_token_id": bos,
            "eos_token_id": eos,
            "pad_token_id": pad,
        }
        config = LlamaConfig.from_hf(raw, self.where)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._architecture_field(key, config.head_dim) != config.head_dim:
                raise SboraxError(
                    f"{self.where}: {prefix}{key} differs from the head width {config.head_dim}; not supported"
                )
        return config

    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The byte-level BPE tokenizer in the file, with its chat template.

        Raises SboraxError for another kind of tokenizer.
        """
        from transformers import PreTrainedTokenizerFast

        kind, cut = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "gpt-2")
        if kind != "gpt2" or not isinstance(cut, str) or cut not in PRE_TOKENIZERS:
            raise SboraxError(
                f"{self.where}: tokenizer {shown(kind)}/{shown(cut)} is not supported; use the Hugging Face directory"
            )
        texts = self._texts("tokens")
        merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in self._texts("merges"))]
        types = self.field("tokenizer.ggml.token_type")
        if not isinstance(types, list) or len(types) != len(texts):
            raise SboraxError(f"{self.where}: tokenizer.ggml.token_type does not say a type of every token")
        vocab = {text: number for number, text in enumerate(texts)}
        lost = next((merge for merge in merges if not {*merge, "".join(merge)} <= vocab.keys()), None)
        if lost is not None:
            raise SboraxError(f"{self.where}: the merge {shown(' '.join(lost))} is not of tokens in the vocabulary")
        # Llama 3 takes a word that is a token as one token, before any merge.
        bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
        if cut in NORMALIZERS:
            bpe.normalizer = NORMALIZERS[cut]
        bpe.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[cut]))
        bpe.decoder = decoders.ByteLevel()
        for text, type_ in zip(texts, types, strict=True):
            if type_ in (CONTROL, USER_DEFINED):
                bpe.add_tokens([AddedToken(text, normalized=False, special=type_ == CONTROL)])
        special = {
            f"{role}_token": self._token(key, texts)
            for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
            if self._has(key)
        }
        if self.field("tokenizer.ggml.add_bos_token", cut in BEGINNING and self._has("bos")):
            bos = self._token("bos", texts)
            bpe.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
            )
        template, length = self.field("tokenizer.chat_template", None), self._architecture_field("context_length")
        if template is not None and not isinstance(template, str):
            raise SboraxError(f"{self.where}: tokenizer.chat_template is no text")
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            chat_template=template,
            model_max_length=length,
            clean_up_tokenization_spaces=False,
            **special,
        )

    @property
    def family(self) -> Family:
        """The family of the model."""
        return FAMILIES[ARCHITECTURES[self.architecture]]

    def _architecture_field(self, key: str, *default: Any) -> Any:
        """A field of the architecture."""
        return self.field(f"{self.architecture}.{key}", *default)

    def _texts(self, key: str) -> list[str]:
        texts = self.field(f"tokenizer.ggml.{key}")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise SboraxError(f"{self.where}: tokenizer.ggml.{key} is no list of texts")
        return texts

    def _token(self, role: str, texts: list[str]) -> str:
        number = self.field(f"tokenizer.ggml.{role}_token_id")
        if type(number) is not int or not 0 <= number < len(texts):
            raise SboraxError(f"{self.where}: tokenizer.ggml.{role}_token_id is {shown(number)}, no token's number")
        return texts[number]

    def _has(self, role: str) -> bool:
        return f"tokenizer.ggml.{role}_token_id" in self.reader.fields

    def _kv_heads(self) -> int:
        return self._architecture_field("attention.head_count_kv", self._architecture_field("attention.head_count"))

    def field(self, key: str, *default: Any) -> Any:
        """One value of the metadata, or the default.

        Raises SboraxError if there is neither, and for text that is not UTF-8.
        """
        field = self.reader.fields.get(key)
        if field is not None:
            try:
                return field.contents()
            except UnicodeDecodeError as failure:
                raise SboraxError(f"{self.where}: field {key!r} is not UTF-8 text ({failure.reason})") from None
        if default:
            return default[0]
        raise SboraxError(f"{self.where}: field {key!r} is missing")


def _short(number: Any) -> Any:
    """A float32 as its shortest decimal: 9.99999975e-06 -> 1e-05. Other values stay as they are."""
    return float(str(np.float32(number))) if isinstance(number, float) else number


def open_gguf(file: Path) -> GGUF:
    """A GGUF file, its tensors still on disk.

    Raises SboraxError for a file that is truncated or of another architecture.
    """
    check_header(file)
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, struct.error) as failure:
        raise SboraxError(f"{file}: not a readable GGUF file ({failure}); fetch it again") from failure
    opened = GGUF(str(file), "", reader, {tensor.name: tensor for tensor in reader.tensors})
    kind = opened.field("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise SboraxError(f"{file}: architecture {shown(kind)} is not supported; known: {', '.join(ARCHITECTURES)}")
    return dataclasses.replace(opened, architecture=kind)
