"""The network: a small qwen3-architecture decoder, written so that its weights map one to one onto a GGUF file.

Shapes follow llama.cpp's qwen3 graph: RMS norms before attention and feed-forward, per-head RMS norms on queries and
keys, NEOX-style rotary positions, grouped-query attention, SwiGLU and tied embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the network; every row length is divisible by 32, as Q8_0 blocks want."""

    n_vocab: int = 2048
    n_embd: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 704
    n_ctx: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale over the last dimension."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Dropout(nn.Module):
    """Dropout whose masks come from random bytes: on a CPU several times cheaper than torch's own.

    `rate` is rounded to a 256th. All layers share one `generator`, which the trainer sets anew for every step.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.n_dropped = round(rate * 256)
        self.scale = 256 / (256 - self.n_dropped)
        self.generator = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.n_dropped == 0:
            return x
        noise = torch.frombuffer(bytearray(self.generator.bytes(x.numel())), dtype=torch.uint8)
        return x * (noise >= self.n_dropped).view(x.shape).to(x.dtype).mul_(self.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to `x` of shape (batch, head, token, head_dim), halves paired as in NEOX."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """One decoder layer."""

    def __init__(self, config: ModelConfig, dropout: Dropout) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        dim, head = config.n_embd, config.head_dim
        self.attn_norm = RMSNorm(dim, config.norm_eps)
        self.q = nn.Linear(dim, config.n_head * head, bias=False)
        self.k = nn.Linear(dim, config.n_head_kv * head, bias=False)
        self.v = nn.Linear(dim, config.n_head_kv * head, bias=False)
        self.o = nn.Linear(config.n_head * head, dim, bias=False)
        self.q_norm = RMSNorm(head, config.norm_eps)
        self.k_norm = RMSNorm(head, config.norm_eps)
        self.ffn_norm = RMSNorm(dim, config.norm_eps)
        self.gate = nn.Linear(dim, config.n_ff, bias=False)
        self.up = nn.Linear(dim, config.n_ff, bias=False)
        self.down = nn.Linear(config.n_ff, dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        config = self.config
        n_batch, n_tokens, _ = x.shape
        h = self.attn_norm(x)
        q = self.q_norm(self.q(h).view(n_batch, n_tokens, config.n_head, config.head_dim)).transpose(1, 2)
        k = self.k_norm(self.k(h).view(n_batch, n_tokens, config.n_head_kv, config.head_dim)).transpose(1, 2)
        v = self.v(h).view(n_batch, n_tokens, config.n_head_kv, config.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        repeat = config.n_head // config.n_head_kv
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        h = self.o(h.transpose(1, 2).reshape(n_batch, n_tokens, -1))
        x = x + self.dropout(h)
        h = self.ffn_norm(x)
        h = self.down(F.silu(self.gate(h)) * self.up(h))
        output: Tensor = x + self.dropout(h)
        return output


class DemoModel(nn.Module):
    """The decoder with tied input and output embeddings."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = Dropout(dropout)
        self.embed = nn.Embedding(config.n_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, self.dropout) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / (2 * config.n_layer) ** 0.5 if name.endswith(("o.weight", "down.weight")) else 0.02
                nn.init.normal_(parameter, std=std)

    def rope_table(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of every position, each of shape (n_ctx, head_dim / 2), float32."""
        half = self.config.head_dim // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(self.config.n_ctx, dtype=torch.float32), frequencies)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits for `tokens` of shape (batch, token).

        `cos` and `sin` broadcast against (batch, head, token, head_dim / 2); `mask` is a boolean
        (batch, 1, token, token) with True where a query may look, or None for plain causal attention.
        """
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        return F.linear(self.norm(x), self.embed.weight)
