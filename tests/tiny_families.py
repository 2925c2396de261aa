"""Tiny random-weight models of the families whose memory differs: full attention, sliding window, hybrid.

All weights are F32, so that a product over one token and one over many agree to the last bits but few; the vocabulary
is that of `tests.tiny_models`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from tests.tiny_models import CHATML, byte_symbols

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, HEAD = 64, 4, 2, 128, 16
WINDOW = 24


class TinyFile:
    """A GGUF with the keys that every family has, and random tensors."""

    def __init__(
        self,
        path: Path,
        architecture: str,
        *,
        n_layer: int,
        n_ctx: int,
        seed: int = 0,
        words: Sequence[str] = (),
        control: Sequence[str] = (),
        chat_template: str | list[dict[str, str]] = CHATML,
    ) -> None:
        self._random = np.random.default_rng(seed)
        self.n_layer = n_layer
        self.writer = writer = gguf.GGUFWriter(path, architecture)
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *control]
        self.tokens = [*byte_symbols(), *special, *words]
        writer.add_name(f"tiny {architecture}")
        writer.add_context_length(n_ctx)
        writer.add_embedding_length(N_EMBD)
        writer.add_block_count(n_layer)
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(N_HEAD)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list(self.tokens)
        normal, controls = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
        writer.add_token_types([normal] * 256 + [controls] * len(special) + [normal] * len(words))
        writer.add_token_merges(["h e", "l l"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(258)
        writer.add_add_bos_token(False)
        writer.add_chat_template(chat_template)

    def random(self, name: str, *shape: int, scale: float | None = None) -> None:
        scale = shape[-1] ** -0.5 if scale is None else scale
        self.writer.add_tensor(name, self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def ones(self, name: str, n: int) -> None:
        self.writer.add_tensor(name, np.ones(n, dtype=np.float32))

    def attention(self, layer: int, *, qk_norm: bool) -> None:
        self.random(f"blk.{layer}.attn_q.weight", N_HEAD * HEAD, N_EMBD)
        self.random(f"blk.{layer}.attn_k.weight", N_HEAD_KV * HEAD, N_EMBD)
        self.random(f"blk.{layer}.attn_v.weight", N_HEAD_KV * HEAD, N_EMBD)
        self.random(f"blk.{layer}.attn_output.weight", N_EMBD, N_HEAD * HEAD)
        if qk_norm:
            # Sharper than 1, so that what a token attends to decides what comes next.
            for part in ("q", "k"):
                self.writer.add_tensor(f"blk.{layer}.attn_{part}_norm.weight", np.full(HEAD, 2, dtype=np.float32))

    def feed_forward(self, layer: int) -> None:
        self.random(f"blk.{layer}.ffn_gate.weight", N_FF, N_EMBD)
        self.random(f"blk.{layer}.ffn_up.weight", N_FF, N_EMBD)
        self.random(f"blk.{layer}.ffn_down.weight", N_EMBD, N_FF)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_tiny_qwen3(path: Path, *, n_ctx: int = 2048, seed: int = 0) -> Path:
    """Full attention."""
    _qwen3(TinyFile(path, "qwen3", n_layer=2, n_ctx=n_ctx, seed=seed))
    return path


def _qwen3(file: TinyFile) -> None:
    file.writer.add_head_count_kv(N_HEAD_KV)
    file.writer.add_key_length(HEAD)
    file.writer.add_value_length(HEAD)
    file.random("token_embd.weight", len(file.tokens), N_EMBD)
    file.ones("output_norm.weight", N_EMBD)
    for layer in range(file.n_layer):
        file.ones(f"blk.{layer}.attn_norm.weight", N_EMBD)
        file.ones(f"blk.{layer}.ffn_norm.weight", N_EMBD)
        file.attention(layer, qk_norm=True)
        file.feed_forward(layer)
    file.close()


RERANK_TEMPLATE = "<|im_start|>judge\n<Q>: {query}\n<D>: {document}<|im_end|>\n<|im_start|>assistant\n"


def write_tiny_reranker(path: Path, *, n_ctx: int = 256, seed: int = 0, head: bool = True) -> Path:
    """A causal reranker as qwen3's: a template for the pair, two labels whose shares are told."""
    templates = [{"name": "default", "template": CHATML}, {"name": "rerank", "template": RERANK_TEMPLATE}]
    file = TinyFile(path, "qwen3", n_layer=2, n_ctx=n_ctx, seed=seed, chat_template=templates)
    file.writer.add_pooling_type(gguf.PoolingType.RANK)
    file.writer.add_classifier_output_labels(["yes", "no"])
    if head:
        file.random("cls.output.weight", 2, N_EMBD, scale=1.0)
    _qwen3(file)
    return path


def write_tiny_gemma3(path: Path, *, n_ctx: int = 2048, seed: int = 0) -> Path:
    """A sliding window of `WINDOW` tokens in five of six layers."""
    file = TinyFile(path, "gemma3", n_layer=6, n_ctx=n_ctx, seed=seed)
    file.writer.add_head_count_kv(N_HEAD_KV)
    file.writer.add_key_length(HEAD)
    file.writer.add_value_length(HEAD)
    file.writer.add_sliding_window(WINDOW)
    file.writer.add_rope_freq_base(1e6)
    file.random("token_embd.weight", len(file.tokens), N_EMBD)
    file.ones("output_norm.weight", N_EMBD)
    for layer in range(file.n_layer):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            file.ones(f"blk.{layer}.{name}.weight", N_EMBD)
        file.attention(layer, qk_norm=True)
        file.feed_forward(layer)
    file.close()
    return path


def write_tiny_gpt_oss(path: Path, *, n_ctx: int = 2048, seed: int = 0, file: TinyFile | None = None) -> Path:
    """A sliding window in every other layer, attention sinks, four experts of which two are used.

    Args:
        file: another vocabulary, or other weights.
    """
    n_experts = 4
    file = file or TinyFile(path, "gpt-oss", n_layer=2, n_ctx=n_ctx, seed=seed)
    file.writer.add_head_count_kv(N_HEAD_KV)
    file.writer.add_key_length(HEAD)
    file.writer.add_value_length(HEAD)
    file.writer.add_rope_dimension_count(HEAD)
    file.writer.add_sliding_window(WINDOW)
    file.writer.add_expert_count(n_experts)
    file.writer.add_expert_used_count(2)
    file.writer.add_expert_feed_forward_length(N_FF)
    file.random("token_embd.weight", len(file.tokens), N_EMBD, scale=1.0)
    file.random("output.weight", len(file.tokens), N_EMBD)
    file.ones("output_norm.weight", N_EMBD)
    for layer in range(file.n_layer):
        file.ones(f"blk.{layer}.attn_norm.weight", N_EMBD)
        file.ones(f"blk.{layer}.post_attention_norm.weight", N_EMBD)
        file.attention(layer, qk_norm=False)
        for part, n in (("q", N_HEAD * HEAD), ("k", N_HEAD_KV * HEAD), ("v", N_HEAD_KV * HEAD), ("output", N_EMBD)):
            file.random(f"blk.{layer}.attn_{part}.bias", n, scale=0.1)
        file.random(f"blk.{layer}.attn_sinks.weight", N_HEAD, scale=1.0)
        file.random(f"blk.{layer}.ffn_gate_inp.weight", n_experts, N_EMBD)
        file.random(f"blk.{layer}.ffn_gate_inp.bias", n_experts, scale=0.1)
        for name in ("gate", "up"):
            file.random(f"blk.{layer}.ffn_{name}_exps.weight", n_experts, N_FF, N_EMBD)
            file.random(f"blk.{layer}.ffn_{name}_exps.bias", n_experts, N_FF, scale=0.1)
        file.random(f"blk.{layer}.ffn_down_exps.weight", n_experts, N_EMBD, N_FF)
        file.random(f"blk.{layer}.ffn_down_exps.bias", n_experts, N_EMBD, scale=0.1)
    file.close()
    return path


def write_tiny_lfm2(path: Path, *, n_ctx: int = 2048, seed: int = 0) -> Path:
    """Hybrid: short convolutions, whose state cannot be cut, and one layer of attention between them."""
    file = TinyFile(path, "lfm2", n_layer=3, n_ctx=n_ctx, seed=seed)
    file.writer.add_head_count_kv([0, N_HEAD_KV, 0])
    file.writer.add_vocab_size(len(file.tokens))
    file.writer.add_shortconv_l_cache(3)
    file.random("token_embd.weight", len(file.tokens), N_EMBD)
    file.ones("token_embd_norm.weight", N_EMBD)
    for layer in range(file.n_layer):
        file.ones(f"blk.{layer}.attn_norm.weight", N_EMBD)
        file.ones(f"blk.{layer}.ffn_norm.weight", N_EMBD)
        if layer == 1:
            file.attention(layer, qk_norm=True)
        else:
            file.random(f"blk.{layer}.shortconv.conv.weight", N_EMBD, 3)
            file.random(f"blk.{layer}.shortconv.in_proj.weight", 3 * N_EMBD, N_EMBD)
            file.random(f"blk.{layer}.shortconv.out_proj.weight", N_EMBD, N_EMBD)
        file.feed_forward(layer)
    file.close()
    return path


FAMILIES: dict[str, Callable[..., Path]] = {
    "qwen3": write_tiny_qwen3,
    "gemma3": write_tiny_gemma3,
    "gpt-oss": write_tiny_gpt_oss,
    "lfm2": write_tiny_lfm2,
}
