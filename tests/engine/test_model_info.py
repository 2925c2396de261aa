"""A header's facts, and that no file, however broken, does more than be refused."""

from __future__ import annotations

import os
import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest

from engine.model_info import read_model_info
from infsvc.errors import ModelFileError
from tests.engine.gguf_files import header, pair, rewrite, text
from tests.tiny_models import CHATML, write_tiny_model

U32, I32, F32, TEXT = (
    gguf.GGUFValueType.UINT32,
    gguf.GGUFValueType.INT32,
    gguf.GGUFValueType.FLOAT32,
    gguf.GGUFValueType.STRING,
)
ARRAY, U64 = 9, 10


def test_the_facts_of_a_model(tiny_model: Path) -> None:
    info = read_model_info(tiny_model)
    assert info.path == tiny_model
    assert info.file_bytes == tiny_model.stat().st_size
    assert (info.architecture, info.family, info.name, info.license) == ("llama", "llama", "tiny", "MIT")
    assert (info.n_ctx_train, info.n_embd, info.n_layer, info.n_vocab) == (2048, 64, 2, 259)
    assert (info.n_head_kv, info.key_length, info.value_length) == (2, 16, 16)
    assert info.quantization == "Q8_0"
    assert info.chat_template == CHATML
    assert (info.pooling, info.causal) == (None, True)
    assert info.special_tokens == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    # Two layers of attention (2·64·64 + 2·32·64) and feed forward (3·128·64) with two norms, embeddings and the last
    # norm.
    assert info.n_params == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64 + 2 * 64) + 259 * 64 + 64
    assert 0 < info.weight_bytes < info.file_bytes


@pytest.mark.parametrize(
    ("number", "name"), [(0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank"), (99, "type 99")]
)
def test_the_pooling_type(tiny_model: Path, tmp_path: Path, number: int, name: str | None) -> None:
    path = rewrite(tiny_model, tmp_path / "m.gguf", {"llama.pooling_type": (U32, number)})
    assert read_model_info(path).pooling == name


@pytest.mark.parametrize(
    ("architecture", "family"),
    [("gemma3", "gemma"), ("qwen3", "qwen"), ("gpt-oss", "gpt"), ("nomic-bert", "nomic"), ("99", "99")],
)
def test_the_family_is_the_architecture_without_its_version(tiny_model: Path, architecture: str, family: str) -> None:
    import dataclasses

    assert dataclasses.replace(read_model_info(tiny_model), architecture=architecture).family == family


def test_values_a_layer_each_count_at_their_largest(tiny_model: Path, tmp_path: Path) -> None:
    path = rewrite(tiny_model, tmp_path / "m.gguf", drop=("llama.attention.head_count_kv",))
    data = path.read_bytes()
    added = pair("llama.attention.head_count_kv", ARRAY, struct.pack("<IQ2I", 4, 2, 0, 2))
    (n_pairs,) = struct.unpack_from("<Q", data, 16)
    changed = tmp_path / "layers.gguf"
    # The data moves by the new pair's length; the padding before it only grows.
    changed.write_bytes(data[:16] + struct.pack("<Q", n_pairs + 1) + added + data[24:] + bytes(64))
    assert read_model_info(changed).n_head_kv == 2


def test_without_a_file_type_the_weights_say_it(tiny_model: Path, tmp_path: Path) -> None:
    assert read_model_info(rewrite(tiny_model, tmp_path / "m.gguf", drop=("general.file_type",))).quantization == "Q8_0"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"nowhere\.gguf is missing.*MODEL_PATH"):
        read_model_info(tmp_path / "nowhere.gguf")


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is a folder"):
        read_model_info(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_model_info(tmp_path / "file" / "model.gguf")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError, match="regular file"):
        read_model_info(tmp_path / "pipe.gguf")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF"),
        (b"<!DOCTYPE html><html>", "not a GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF"),
        (b"GGUF", "truncated"),
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (header()[:20], "truncated"),
        (header(rest=bytes(64)), "whole model"),
        (header(n_pairs=2**40), "claims"),
        (header(n_tensors=2**63), "claims"),
        (header(n_pairs=5), "truncated"),
        (header(text("key") + struct.pack("<I", 77)), "unknown type 77"),
        (header(struct.pack("<Q", 2**62) + b"key"), "text of"),
        (header(struct.pack("<Q", 2**20) + b"key"), "truncated"),
        (header(pair("a", ARRAY, struct.pack("<IQ", 4, 2**61))), "truncated"),
        (header(pair("a", ARRAY, struct.pack("<IQ", 8, 2**61))), "truncated"),
        (header(pair("a", ARRAY, struct.pack("<IQ", 8, 3_000_000))), "truncated"),
        (header(pair("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", 8, 2**63))), "truncated"),
        (header(pair("a", ARRAY, struct.pack("<IQ", 77, 1))), "unknown type 77"),
        (header(n_tensors=1, rest=text("w") + struct.pack("<I", 5)), "5 dimensions"),
        (header(n_tensors=1, rest=text("w") + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0)), "truncated"),
        (header(n_tensors=1, rest=text("w") + struct.pack("<IQIQ", 1, 1, 0, 2**64 - 1)), "truncated"),
    ],
)
def test_what_is_no_model_is_refused_with_a_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=why) as caught:
        read_model_info(path)
    assert "bad.gguf" in str(caught.value)


def test_arrays_in_arrays_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.gguf"
    path.write_bytes(header(pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) * 50_000)))
    with pytest.raises(ModelFileError, match="arrays deep"):
        read_model_info(path)


@pytest.mark.parametrize("alignment", [(U32, 0), (U32, 7), (I32, -32), (F32, float("nan")), (TEXT, "x")])
def test_an_impossible_alignment_is_refused(tiny_model: Path, tmp_path: Path, alignment: Any) -> None:
    path = tmp_path / "m.gguf"
    data = tiny_model.read_bytes()
    packed = {U32: "<I", I32: "<i", F32: "<f"}
    kind, value = alignment
    value_bytes = text(value) if kind == TEXT else struct.pack(packed[kind], value)
    (n_pairs,) = struct.unpack_from("<Q", data, 16)
    path.write_bytes(
        data[:16] + struct.pack("<Q", n_pairs + 1) + pair("general.alignment", int(kind), value_bytes) + data[24:]
    )
    with pytest.raises(ModelFileError, match="damaged"):
        read_model_info(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.embedding_length", (U32, 0)),
        ("llama.embedding_length", (I32, -64)),
        ("llama.block_count", (U32, 0)),
        ("llama.block_count", (I32, -1)),
        ("llama.context_length", (I32, -5)),
        ("llama.context_length", (F32, float("inf"))),
        ("llama.context_length", (TEXT, "many")),
        ("llama.attention.head_count", (I32, -4)),
        ("general.file_type", (TEXT, "Q8")),
        ("tokenizer.ggml.tokens", (TEXT, "not a list")),
        ("tokenizer.ggml.tokens", [1, 2, 3]),
        # llama.cpp ends the process on each of these.
        ("llama.block_count", (U32, 513)),
        ("llama.block_count", (U32, 2**32 - 1)),
        ("llama.attention.layer_norm_rms_epsilon", (F32, float("nan"))),
        ("llama.attention.layer_norm_rms_epsilon", (F32, -1.0)),
        ("tokenizer.ggml.tokens", ["a"] * 259),
    ],
)
def test_zero_negative_and_wrong_values_are_refused(tiny_model: Path, tmp_path: Path, key: str, value: Any) -> None:
    path = rewrite(tiny_model, tmp_path / "m.gguf", {key: value})
    with pytest.raises(ModelFileError, match=r"m\.gguf"):
        read_model_info(path)


@pytest.mark.parametrize("key", ["general.name", "general.license", "tokenizer.chat_template"])
def test_a_text_of_the_wrong_type_counts_as_none(tiny_model: Path, tmp_path: Path, key: str) -> None:
    info = read_model_info(rewrite(tiny_model, tmp_path / "m.gguf", {key: (U32, 5)}))
    assert None in (info.name, info.license, info.chat_template)


def test_a_model_without_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = tiny_model.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:8] + struct.pack("<Q", 0) + data[16:])
    with pytest.raises(ModelFileError, match="no weights"):
        read_model_info(path)


def test_truncated_weights_are_counted(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match=r"truncated: [\d,]+ of [\d,]+ bytes are missing"):
        read_model_info(path)


def test_cut_anywhere_a_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = tiny_model.read_bytes()
    path = tmp_path / "m.gguf"
    for length in (*range(0, 600, 7), *range(600, len(data) - 64, 4001)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelFileError):
            read_model_info(path)


def test_flipped_bytes_never_do_more_than_be_refused(tiny_model: Path, tmp_path: Path) -> None:
    chance = random.Random(20260101)
    data = tiny_model.read_bytes()
    path = tmp_path / "m.gguf"
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(4, 9000)] = chance.randrange(256)
        path.write_bytes(changed)
        with suppress(ModelFileError):  # and nothing else
            read_model_info(path)


def test_a_large_vocabulary_is_counted(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", n_vocab=50_000, n_embd=32, n_ff=32)
    assert read_model_info(path).n_vocab == 50_000
