"""Model files with one thing changed, and headers that no writer would write."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf


def rewrite(source: Path, target: Path, change: Mapping[str, Any] | None = None, drop: tuple[str, ...] = ()) -> Path:
    """Copies a model file with some header values changed, added (as a pair of type and value) or left out."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    changes = dict(change or {})
    for key, found in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop:
            continue
        kind, value = found.types[0], found.contents()
        if key in changes:
            value = changes.pop(key)
            if isinstance(value, tuple):
                kind, value = value
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kind)
    for key, (kind, value) in changes.items():
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def header(*pairs: bytes, n_pairs: int | None = None, n_tensors: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    """The beginning of a GGUF file, with counts that may be lies."""
    n = len(pairs) if n_pairs is None else n_pairs
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n) + b"".join(pairs) + rest
