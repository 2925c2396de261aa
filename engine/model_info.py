"""The facts in a GGUF file's header, read without llama.cpp and without its weights.

A header of a 152k vocabulary is parsed in about 0.1 s, because the long string arrays are skipped by their lengths. The
layout is that of the GGUF specification, versions 2 and 3 (ggml/docs/gguf.md).
"""

from __future__ import annotations

import math
import stat
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from infsvc.errors import ModelFileError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# A damaged or hostile file may claim anything: these bounds are some times what the largest real headers hold.
_MAX_HEADER_BYTES = 2**27
_MAX_STRING_BYTES = 2**24
_MAX_PAIRS = _MAX_TENSORS = 2**16
_MAX_DEPTH = 4
# LLAMA_MAX_LAYERS; llama.cpp aborts on more, on a negative epsilon and on a vocabulary that holds a token twice.
_MAX_LAYERS = 512
_POOLING = {-1: None, 0: None, 1: "mean", 2: "cls", 3: "last", 4: "rank"}

# general.file_type → name, from llama.cpp's enum llama_ftype.
_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip

# ggml type → (name, values in a block, bytes of a block), from ggml.c's type traits.
_TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}  # fmt: skip

_REPACKED = frozenset({"Q4_0", "Q4_K", "IQ4_NL"})
"""On x86-64 with AVX2, where it was measured; other CPUs repack other types too."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a model file says of itself. Counts are plain numbers, sizes bytes."""

    path: Path
    file_bytes: int
    architecture: str
    name: str | None
    license: str | None
    n_params: int
    weight_bytes: int
    n_ctx_train: int
    n_embd: int
    n_layer: int
    n_vocab: int
    n_head_kv: int
    key_length: int
    value_length: int
    quantization: str
    chat_template: str | None
    pooling: str | None
    causal: bool
    special_tokens: frozenset[str]
    n_head: int = 0
    n_head_kv_all: int = 0
    """KV heads of all layers together: hybrid models have layers with none."""
    n_ff: int = 0
    """Width of what a feed-forward layer computes for a token, over the experts that are used."""
    has_window: bool = False
    n_scores: int = 0
    """What the classification head of a reranker tells of a text; 0 without one."""
    rerank_template: str | None = None
    repacked_bytes: int = 0
    """Weights of which llama.cpp makes a copy in another order, where the CPU and the build have one."""

    @property
    def family(self) -> str:
        """The architecture without its version: `gemma3` → `gemma`."""
        return self.architecture.split("-")[0].rstrip("0123456789.") or self.architecture


class _Reader:
    """Little-endian values from a file of known size; running off its end is a truncated file."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self._stream, self._path = stream, path
        self._left = min(size, _MAX_HEADER_BYTES)
        self.n_read = 0

    def take(self, n: int) -> bytes:
        data = self._stream.read(n) if n <= self._left else b""
        if len(data) != n:
            raise ModelFileError(f"{self._path} is truncated or damaged in its header: fetch it again")
        self._left -= n
        self.n_read += n
        return data

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code)))[0]

    def text(self, errors: str = "replace") -> str:
        n = self.scalar("Q")
        if n > _MAX_STRING_BYTES:
            raise ModelFileError(f"{self._path} is damaged: its header claims a text of {n} bytes")
        return self.take(n).decode("utf-8", errors)

    def value(self, kind: int, *, keep: bool, depth: int = 0) -> Any:
        """A value of a GGUF type. Strings of an array are only counted unless `keep`."""
        if kind == _STRING:
            # Texts of a list are kept apart even where they are no UTF-8.
            return self.text("surrogateescape" if depth else "replace")
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise ModelFileError(
                f"{self._path} has a header value of unknown type {kind}, {depth} arrays deep: "
                "it is damaged or newer than this program"
            )
        item, n = self.scalar("I"), self.scalar("Q")
        if item in _SCALARS:
            code = _SCALARS[item]
            data = self.take(n * struct.calcsize(code))
            return struct.unpack(f"<{n}{code}", data)
        # Each item takes bytes of the file, so the loop ends with it whatever `n` claims.
        if keep:
            return tuple(self.value(item, keep=True, depth=depth + 1) for _ in range(n))
        for _ in range(n):
            self.value(item, keep=False, depth=depth + 1)
        return n


def read_model_info(path: Path) -> ModelInfo:
    """Reads the header. Blocks for up to some 100 ms: call it off the loop.

    Raises:
        ModelFileError: the file is missing, no GGUF, or shorter than its header says.
    """
    try:
        told = path.stat()
        size = told.st_size
        # Opening a pipe would wait for its writer.
        if not stat.S_ISREG(told.st_mode) and not stat.S_ISDIR(told.st_mode):
            raise ModelFileError(f"{path} is not a regular file")
        with path.open("rb") as stream:
            return _parse(_Reader(stream, path, size), path, size)
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing: put the file there, or name another with MODEL_PATH") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder: MODEL_PATH must name a .gguf file") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{path} is damaged: its header holds a value of the wrong kind ({error})") from None


def _parse(reader: _Reader, path: Path, size: int) -> ModelInfo:
    if size == 0:
        raise ModelFileError(f"{path} is empty: fetch it again")
    if size < 4 or reader.take(4) != b"GGUF":
        raise ModelFileError(f"{path} is not a GGUF file: it must begin with the four letters GGUF")
    version = reader.scalar("I")
    if version not in (2, 3):
        raise ModelFileError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
    n_tensors, n_pairs = reader.scalar("Q"), reader.scalar("Q")
    if n_tensors > _MAX_TENSORS or n_pairs > _MAX_PAIRS:
        raise ModelFileError(f"{path} is damaged: its header claims {n_tensors} tensors and {n_pairs} values")
    facts: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = reader.text()
        facts[key] = reader.value(reader.scalar("I"), keep=key == "tokenizer.ggml.tokens")
    n_params, weight_bytes, repacked_bytes, data_end, kinds, scores = _tensors(reader, path, n_tensors)
    alignment = int(facts.get("general.alignment", 32))
    if alignment < 1 or alignment & (alignment - 1):
        raise ModelFileError(f"{path} is damaged: an alignment of {alignment} is no power of two")
    data_start = -(-reader.n_read // alignment) * alignment
    if data_start + data_end > size:
        missing = data_start + data_end - size
        raise ModelFileError(
            f"{path} is truncated: {missing:,} of {data_start + data_end:,} bytes are missing; fetch it again"
        )

    arch = str(facts.get("general.architecture", "")) or "unknown"

    def number(key: str, default: int = 0) -> int:
        value = facts.get(f"{arch}.{key}", default)
        answer = int(max(value, default=default) if isinstance(value, tuple) else value)
        if answer < 0 and key != "pooling_type":
            raise ModelFileError(f"{path} is damaged: {arch}.{key} is {answer}")
        return answer

    def text(key: str) -> str | None:
        value = facts.get(key)
        return value if isinstance(value, str) else None

    if number("block_count") > _MAX_LAYERS:
        raise ModelFileError(f"{path} is damaged: its header claims {number('block_count')} layers")
    for key, value in facts.items():
        if key.endswith("_epsilon") and not 0 <= float(value) < 1:
            raise ModelFileError(f"{path} is damaged: {key} is {value}")
    for key in ("embedding_length", "block_count"):
        if number(key) == 0:
            raise ModelFileError(f"{path} is not a whole model: its header has no {arch}.{key}")
    if n_tensors == 0:
        raise ModelFileError(f"{path} is not a whole model: it holds no weights")
    n_head = number("attention.head_count", 1)
    head_dim = number("embedding_length") // max(1, n_head)
    tokens = facts.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, tuple) or any(not isinstance(token, str) for token in tokens):
        raise ModelFileError(f"{path} is damaged: tokenizer.ggml.tokens is no list of texts")
    spelled = [token for token in tokens if token]
    if len(set(spelled)) < len(spelled):
        raise ModelFileError(f"{path} is damaged: its vocabulary holds a token twice")
    pooling = number("pooling_type")
    n_scores = scores.get("cls.output.weight", scores.get("cls.weight", 0))
    n_head_kv, heads = number("attention.head_count_kv", n_head), facts.get(f"{arch}.attention.head_count_kv")
    return ModelInfo(
        path=path,
        file_bytes=size,
        architecture=arch,
        name=text("general.name"),
        license=text("general.license"),
        n_params=n_params,
        weight_bytes=weight_bytes,
        n_ctx_train=number("context_length"),
        n_embd=number("embedding_length"),
        n_layer=number("block_count"),
        n_vocab=len(tokens) or number("vocab_size"),
        n_head_kv=n_head_kv,
        key_length=number("attention.key_length", head_dim),
        value_length=number("attention.value_length", head_dim),
        quantization=_quantization(facts, kinds),
        chat_template=text("tokenizer.chat_template"),
        pooling=_POOLING.get(pooling, f"type {pooling}"),
        causal=bool(facts.get(f"{arch}.attention.causal", True)),
        special_tokens=frozenset(
            token for token in tokens if token[:1] in "<[" and token[-1:] in ">]" and len(token) > 2
        ),
        n_head=n_head,
        n_head_kv_all=sum(heads) if isinstance(heads, tuple) else number("block_count") * n_head_kv,
        n_ff=max(
            number("feed_forward_length"), number("expert_feed_forward_length") * max(1, number("expert_used_count"))
        ),
        has_window=number("attention.sliding_window") > 0,
        # llama.cpp takes as many values as there are labels, one without any, whatever the head gives.
        n_scores=n_scores if n_scores == number("classifier.output_labels", 1) else 0,
        rerank_template=text("tokenizer.chat_template.rerank"),
        repacked_bytes=repacked_bytes,
    )


def _tensors(reader: _Reader, path: Path, n_tensors: int) -> tuple[int, int, int, int, Counter[str], dict[str, int]]:
    """Parameters, bytes of weights, those of them that may be repacked, end of the data relative to its start, values
    by tensor type, and the outputs of a classification head's matrices."""
    n_params = weight_bytes = repacked_bytes = data_end = 0
    kinds: Counter[str] = Counter()
    scores: dict[str, int] = {}
    for _ in range(n_tensors):
        name = reader.text()
        n_dims = reader.scalar("I")
        if n_dims > 4:
            raise ModelFileError(f"{path} is damaged: tensor {name!r} has {n_dims} dimensions")
        dims = [reader.scalar("Q") for _ in range(n_dims)]
        n_values = math.prod(dims)
        if name in ("cls.weight", "cls.output.weight"):
            scores[name] = dims[1] if n_dims > 1 else 1
        kind, offset = reader.scalar("I"), reader.scalar("Q")
        n_params += n_values
        if kind in _TENSOR_TYPES:
            label, per_block, block_bytes = _TENSOR_TYPES[kind]
            n_bytes = n_values // per_block * block_bytes
            kinds[label] += n_values
            weight_bytes += n_bytes
            # Rows of the token table are looked up, not multiplied with.
            if label in _REPACKED and n_dims > 1 and name != "token_embd.weight":
                repacked_bytes += n_bytes
            data_end = max(data_end, offset + n_bytes)
    return n_params, weight_bytes, repacked_bytes, data_end, kinds, scores


def _quantization(facts: dict[str, Any], kinds: Counter[str]) -> str:
    """The file type's name; without one, the type that holds most values."""
    named = _FILE_TYPES.get(int(facts.get("general.file_type", -1)))
    if named:
        return named
    return kinds.most_common(1)[0][0] if kinds else "unknown"
