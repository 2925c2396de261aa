"""How a token is drawn, where it is not simply the likeliest."""

from __future__ import annotations

from engine.llama.context import LlamaContext
from engine.llama.native import lib
from engine.sampling import SamplerSpec
from infsvc.errors import LlamaError


class SamplerChain:
    """top_k, top_p, min_p, temperature and the draw, in llama.cpp's order and with its meaning. Engine thread."""

    def __init__(self, spec: SamplerSpec) -> None:
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if not self._chain:
            raise LlamaError("no memory for a sampler chain")
        parts = []
        if spec.top_k > 0:
            parts.append(lib.llama_sampler_init_top_k(spec.top_k))
        if spec.top_p < 1:
            parts.append(lib.llama_sampler_init_top_p(spec.top_p, 1))
        if spec.min_p > 0:
            parts.append(lib.llama_sampler_init_min_p(spec.min_p, 1))
        parts.append(lib.llama_sampler_init_temp(spec.temperature))
        parts.append(lib.llama_sampler_init_dist(spec.seed))
        for part in parts:
            if not part:
                raise LlamaError("no memory for a sampler")
            lib.llama_sampler_chain_add(self._chain, part)

    def draw(self, context: LlamaContext, index: int) -> int:
        """Draws a token from the logits of a batch position. Raises `LlamaError` where there are none."""
        if not self._chain:
            raise LlamaError("the sampler is closed")
        if not lib.llama_get_logits_ith(context.handle, index):
            raise LlamaError(f"no logits at batch position {index}")
        return int(lib.llama_sampler_sample(self._chain, context.handle, index))

    def close(self) -> None:
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None
