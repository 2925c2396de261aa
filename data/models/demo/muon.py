"""The optimiser of the hidden matrices: momentum whose update is made orthogonal (Muon, Keller Jordan, 2024).

Kept in float32, because bfloat16 products are slow on CPUs without instructions for them. With several processes each
orthogonalises its share of the matrices, and the updates are then exchanged.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration, from the reference implementation.
A, B, C = 3.4445, -4.7750, 2.0315


def orthogonal(matrix: Tensor, n_steps: int = 5) -> Tensor:
    """The nearly orthogonal matrix closest to `matrix`: singular values are pushed towards 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(n_steps):
        square = x @ x.T
        x = A * x + (B * square + C * square @ square) @ x
    return x.T if tall else x


class Muon:
    """Steps `matrices`; an update's root mean square is 0.2 times the rate, as AdamW's typically is."""

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        self.matrices = matrices
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.buffers = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update with the gradients at hand, which must be the same in every process."""
        shared = dist.is_initialized()
        rank, size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        updates = []
        for i, (matrix, buffer) in enumerate(zip(self.matrices, self.buffers, strict=True)):
            gradient = matrix.grad
            if gradient is None:
                raise ValueError("a matrix has no gradient")
            buffer.lerp_(gradient, 1 - self.momentum)
            if i % size == rank:
                scale = 0.2 * math.sqrt(max(matrix.shape))
                updates.append(orthogonal(gradient.lerp(buffer, self.momentum)) * scale)
            else:
                updates.append(torch.zeros_like(matrix))
        if shared:
            flat = torch.cat([update.flatten() for update in updates])
            dist.all_reduce(flat)
            parts = torch.split(flat, [update.numel() for update in updates])
            updates = [part.view_as(update) for part, update in zip(parts, updates, strict=True)]
        for matrix, update in zip(self.matrices, updates, strict=True):
            matrix.mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate)
