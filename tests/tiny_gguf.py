"""GGUF files of tiny torch models."""

import gguf
import numpy as np


def write_gguf(file, reference, pre=None, add_bos=True, **extra):
    """The tiny torch model as llama.cpp writes it: LLaMA's rows of q and k interleaved, a small BPE tokenizer.

    - pre: how its tokenizer cuts text; None for that of the family.
    - add_bos: whether it puts a token before each text; None for a file that does not say.
    - extra: further fields, with two underscores for a dot.
    """
    config = reference.config
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_key_length(reference.model.layers[0].self_attn.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre or ("gpt-2" if config.model_type == "llama" else "qwen2"))
    letters = ["<s>", *"abcdefgh", "Ġ", "ab"]
    writer.add_token_list([*letters, *(f"<{i}>" for i in range(config.vocab_size - len(letters)))])
    writer.add_token_types([3] + [1] * (config.vocab_size - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    for key, value in extra.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key.replace("__", "."), value)
    short = {
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in reference.state_dict().items():
        array, part = tensor.numpy(), name.split(".")[-2]
        if part in heads and config.model_type == "llama":
            halves = array.reshape(heads[part], 2, -1, *array.shape[1:])
            array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        for theirs, ours in short.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
