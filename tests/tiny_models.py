"""Random-weight models in milliseconds: real GGUF files of a real architecture that load, tokenise and decode, and
say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_symbols() -> list[str]:
    """The 256 characters that GPT-2's byte-level BPE writes bytes as, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols, n = {}, 0
    for byte in range(256):
        if byte in printable:
            symbols[byte] = chr(byte)
        else:
            symbols[byte] = chr(256 + n)
            n += 1
    return [symbols[byte] for byte in range(256)]


def write_tiny_model(
    path: Path,
    *,
    n_vocab: int = 0,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_ff: int = 128,
    n_ctx: int = 2048,
    chat_template: str | None = CHATML,
    special: tuple[str, ...] = (),
    words: Sequence[str] = (),
    pooling: int | None = None,
    quantise: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.Q8_0,
    seed: int = 0,
) -> Path:
    """Writes a llama-architecture model with random weights.

    Args:
        n_vocab: at least the 256 bytes and the special tokens; more are filled with made-up words. 0: just those.
        words: the fillers instead of made-up ones, in the symbols of `byte_symbols`.
        special: further user-defined tokens, such as `<think>`.
        pooling: a pooling type in the header, as embedding models have.
    """
    random = np.random.default_rng(seed)
    tokens = [*byte_symbols(), "<|endoftext|>", "<|im_start|>", "<|im_end|>", *special]
    types = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.USER_DEFINED] * len(special)
    fillers = iter(words)
    while len(tokens) < n_vocab:
        tokens.append(next(fillers, f"w{len(tokens)}"))
        types.append(gguf.TokenType.NORMAL)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("MIT")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_embd // n_head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    if pooling is not None:
        writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)

    def add(name: str, *shape: int, norm: bool = False) -> None:
        values: Any = (
            np.ones(shape, dtype=np.float32)
            if norm
            else random.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5
        )
        if norm:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, quantise), raw_dtype=quantise)

    kv = n_embd // n_head * n_head_kv
    add("token_embd.weight", len(tokens), n_embd)
    add("output_norm.weight", n_embd, norm=True)
    for layer in range(n_layer):
        add(f"blk.{layer}.attn_norm.weight", n_embd, norm=True)
        add(f"blk.{layer}.attn_q.weight", n_embd, n_embd)
        add(f"blk.{layer}.attn_k.weight", kv, n_embd)
        add(f"blk.{layer}.attn_v.weight", kv, n_embd)
        add(f"blk.{layer}.attn_output.weight", n_embd, n_embd)
        add(f"blk.{layer}.ffn_norm.weight", n_embd, norm=True)
        add(f"blk.{layer}.ffn_gate.weight", n_ff, n_embd)
        add(f"blk.{layer}.ffn_up.weight", n_ff, n_embd)
        add(f"blk.{layer}.ffn_down.weight", n_embd, n_ff)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_large_model(path: Path) -> Path:
    """About 0.4B random parameters with a vocabulary of 152k: the cost of a real model, without its sense."""
    return write_tiny_model(
        path, n_vocab=151_936, n_embd=1024, n_layer=24, n_head=16, n_head_kv=8, n_ff=2816, n_ctx=8192
    )
