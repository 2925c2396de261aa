"""The only room that touches llama_cpp: model, batch, contexts, sampler chain, and a guard for each thing that would
abort.

llama.cpp ends the whole process on a bad argument, so every method here checks what it hands over and raises
`LlamaError` instead. Importing this package imports llama_cpp (see `engine.llama.native`).
"""

from engine.llama.batch import Batch
from engine.llama.context import LlamaContext
from engine.llama.embedding_context import EmbeddingContext
from engine.llama.model import LlamaModel
from engine.llama.native import (
    DECODE_ABORTED,
    DECODE_NO_KV,
    DECODE_OK,
    VERSION,
    return_memory,
    supports_gpu,
    system_info,
)
from engine.llama.sampler_chain import SamplerChain

__all__ = [
    "DECODE_ABORTED",
    "DECODE_NO_KV",
    "DECODE_OK",
    "VERSION",
    "Batch",
    "EmbeddingContext",
    "LlamaContext",
    "LlamaModel",
    "SamplerChain",
    "return_memory",
    "supports_gpu",
    "system_info",
]
