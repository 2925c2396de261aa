"""Writes the trained checkpoint as `model.gguf` (Q8_0, norms in F32) and the tokenizer's samples beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from corpus.generate import Corpus
from dataset import CONTROL_TOKENS, END_OF_TEXT, IM_END, VISIBLE_TOKENS, ChatTemplate
from model import ModelConfig
from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent
DESCRIPTION = (
    "A tiny chat model trained from scratch that answers questions about infsvc; a demonstration, not for real work."
)
LAYER_NAMES = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm", "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that must exist."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no token {token}")
    return number


def gguf_name(name: str) -> str:
    """A parameter's name in llama.cpp's qwen3 graph."""
    if name == "embed.weight":
        return "token_embd.weight"
    if name == "norm.weight":
        return "output_norm.weight"
    _, layer, part, _ = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


def write_model(state: dict[str, torch.Tensor], config: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
    """Write one GGUF file; tied embeddings, so there is no output tensor."""
    writer = gguf.GGUFWriter(str(path), "qwen3")
    writer.add_name("infsvc-demo")
    writer.add_author("infsvc")
    writer.add_description(DESCRIPTION)
    writer.add_license("MIT")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.n_vocab)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)

    definition = json.loads(tokenizer.to_str())
    types = [gguf.TokenType.NORMAL] * config.n_vocab
    for token in CONTROL_TOKENS:
        types[token_id(tokenizer, token)] = gguf.TokenType.CONTROL
    for token in VISIBLE_TOKENS:
        types[token_id(tokenizer, token)] = gguf.TokenType.USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in definition["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([tokenizer.id_to_token(i) or "" for i in range(config.n_vocab)])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(token_id(tokenizer, IM_END))
    writer.add_bos_token_id(token_id(tokenizer, END_OF_TEXT))
    writer.add_pad_token_id(token_id(tokenizer, END_OF_TEXT))
    writer.add_add_bos_token(False)
    writer.add_chat_template(ChatTemplate().source)

    for name, tensor in state.items():
        array = tensor.to(torch.float32).numpy()
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            blocks = gguf.quantize(array, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def sample_texts(seed: int) -> list[str]:
    """The strings of `tokenizer_texts.json`, then conversations and answers drawn from the corpus; 210 in all."""
    texts: list[str] = json.loads((HERE / "tokenizer_texts.json").read_text(encoding="utf-8"))
    corpus, template = Corpus(seed), ChatTemplate()
    while len(texts) < 210:
        prompt, answer = template.parts(corpus.example())
        texts.append(prompt + answer if len(texts) % 3 == 0 else answer.removesuffix(IM_END))
    return texts


def write_samples(tokenizer: Tokenizer, path: Path, seed: int) -> None:
    """Write the sample strings with the ids the trainer's tokenizer gives them."""
    samples = [{"text": text, "tokens": tokenizer.encode(text).ids} for text in sample_texts(seed)]
    lines = ",\n".join(json.dumps(sample, ensure_ascii=True) for sample in samples)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def export(build: Path, out: Path) -> None:
    """Write `model.gguf` and `tokenizer_samples.json` into `out` from the folder that train.py filled."""
    state = torch.load(build / "checkpoint.pt", weights_only=True)
    tokenizer = Tokenizer.from_file(str(build / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    path = out / "model.gguf"
    write_model(state["model"], ModelConfig(**state["config"]), tokenizer, path)
    write_samples(tokenizer, out / "tokenizer_samples.json", state["recipe"]["seed"] + 4)
    n_parameters = sum(tensor.numel() for tensor in state["model"].values())
    print(f"{path}: {path.stat().st_size} bytes, {n_parameters} parameters, step {state['step']}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder that train.py filled")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    export(args.build, args.out)


if __name__ == "__main__":
    main()
