"""Trains the demo model from its seed: corpus, tokenizer, network, and then the GGUF file by `export.py`.

About 50 minutes on two quiet CPU cores with the default arguments; `--resume` goes on after an interruption. Each core
runs a process of its own on a share of every batch, and gradients are summed once a step: threads inside one process
would meet at every operation, which on a busy machine costs several times the work itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus.generate import Corpus
from corpus.source import Example
from dataset import Batch, ChatTemplate, Encoder, batches, train_tokenizer
from export import export
from model import DemoModel, ModelConfig
from muon import Muon
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

HERE = Path(__file__).resolve().parent
DEFAULT_STEPS = 2300
# (step, share of the peak rate) between which the rate is interpolated; other lengths scale the steps.
RATES = ((-1, 0.0), (59, 1.0), (1000, 1.0), (1700, 0.3), (1720, 0.5), (1900, 0.5), (2300, 0.0))
COPY_STEPS = (500, 900)
DRILL_STEP = 1700


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of one run."""

    seed: int
    steps: int
    processes: int
    withhold: int
    n_positions: int = 4096
    peak_rate: float = 3e-3
    weight_decay: float = 0.1
    dropout: float = 0.1
    copy_share: float = 0.25
    drill_share: float = 0.15

    def usual(self, step: int) -> float:
        """The step of a run of the usual length that is as far on as `step` is in this one."""
        return step * DEFAULT_STEPS / self.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, a constant stretch, and two descents; the drills start between them."""
        steps, shares = [place for place, _ in RATES], [share for _, share in RATES]
        return self.peak_rate * float(np.interp(self.usual(step), steps, shares))

    def copying(self, step: int) -> float:
        """Share of long texts to repeat among a step's examples."""
        return self.copy_share if COPY_STEPS[0] <= self.usual(step) < COPY_STEPS[1] else 0.0

    def drilling(self, step: int) -> float:
        """Share of chains of sums among a step's examples."""
        return self.drill_share if self.usual(step) >= DRILL_STEP else 0.0


class Log:
    """Writes lines to the terminal and to a file; only the first process speaks."""

    def __init__(self, path: Path, speaks: bool) -> None:
        self.file = path.open("a", encoding="utf-8") if speaks else None
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        if self.file is None:
            return
        line = f"{time.monotonic() - self.start:7.0f} s  {text}"
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def rope(tables: tuple[Tensor, Tensor], positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines for positions of shape (batch, token), with a head dimension of one."""
    return tables[0][positions].unsqueeze(1), tables[1][positions].unsqueeze(1)


def batch_loss(model: DemoModel, tables: tuple[Tensor, Tensor], batch: Batch, rank: int = 0, size: int = 1) -> Tensor:
    """The weighted cross-entropy of this process's rows; summed over all processes it is the batch's weighted mean."""
    mine = slice(rank, None, size)
    tokens, targets = torch.from_numpy(batch.tokens[mine]), torch.from_numpy(batch.targets[mine].copy())
    documents, weights = torch.from_numpy(batch.documents[mine]), torch.from_numpy(batch.weights[mine].copy())
    length = tokens.shape[1]
    mask = (documents.unsqueeze(2) == documents.unsqueeze(1)) & torch.ones(length, length, dtype=torch.bool).tril()
    cos, sin = rope(tables, torch.from_numpy(batch.positions[mine]))
    logits = model(tokens, cos, sin, mask.unsqueeze(1))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / float(batch.weights.sum())


@torch.inference_mode()
def share_right(
    model: DemoModel, tables: tuple[Tensor, Tensor], tokenizer: Tokenizer, cases: list[tuple[str, str]], n_tokens: int
) -> float:
    """Share of (prompt, answer) cases whose first `n_tokens` answer tokens greedy decoding would give."""
    right = 0
    model.eval()
    for start in range(0, len(cases), 32):
        pairs = [(tokenizer.encode(p).ids, tokenizer.encode(a).ids[:n_tokens]) for p, a in cases[start : start + 32]]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        tokens = torch.zeros(len(pairs), length, dtype=torch.long)
        for i, (prompt, answer) in enumerate(pairs):
            tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        cos, sin = rope(tables, torch.arange(length).expand(1, -1))
        best = model(tokens, cos, sin).argmax(-1)
        for i, (prompt, answer) in enumerate(pairs):
            right += best[i, len(prompt) - 1 : len(prompt) + len(answer) - 1].tolist() == answer
    model.train()
    return right / max(1, len(cases))


def measuring_cases(corpus: Corpus, template: ChatTemplate, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Cases to watch during training: withheld questions, and fresh draws of every kind."""
    cases: dict[str, list[tuple[str, str]]] = {}
    for name, question in corpus.withheld:
        example = Example(
            "withheld",
            [{"role": "user", "content": question}, {"role": "assistant", "content": corpus.topics[name]["answer"]}],
        )
        cases.setdefault("withheld", []).append(template.parts(example))
    fresh = Corpus(seed, 0)
    fresh.topics, fresh.telling = corpus.topics, corpus.telling
    for _ in range(1500):
        example = fresh.example()
        example.cut = False
        kind = cases.setdefault(example.kind, [])
        if len(kind) < 16 and len(template.parts(example)[0]) < 1500:
            kind.append(template.parts(example))
    return cases


def save(path: Path, model: DemoModel, optimizer: torch.optim.Optimizer, muon: Muon, step: int, recipe: Recipe) -> None:
    """Write a checkpoint in one piece."""
    state: dict[str, Any] = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "muon": muon.buffers, "step": step,
        "recipe": dataclasses.asdict(recipe), "config": dataclasses.asdict(model.config),
    }  # fmt: skip
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def sum_gradients(model: DemoModel, loss: Tensor) -> float:
    """Sum the gradients and the loss over all processes; returns the loss of the whole batch."""
    if not dist.is_initialized():
        return loss.item()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss.detach().reshape(1)])
    dist.all_reduce(flat)
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()
    return flat[-1].item()


def train(rank: int, recipe: Recipe, out: Path, resume: bool) -> None:
    """Run one process of the recipe into the folder `out`, from its last checkpoint if `resume`."""
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)
    size = recipe.processes
    if size > 1:
        place = (out / "rendezvous").resolve().as_uri()
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=size)
    log = Log(out / "train.log", rank == 0)
    template = ChatTemplate()
    tokenizer = train_tokenizer(Corpus(recipe.seed, recipe.withhold), template)
    if rank == 0:
        tokenizer.save(str(out / "tokenizer.json"))
    corpus = Corpus(recipe.seed + 1, recipe.withhold)
    cases = measuring_cases(corpus, template, recipe.seed + 2) if rank == 0 else {}
    stream = batches(corpus, Encoder(tokenizer, template, recipe.seed + 3), recipe.n_positions)

    model = DemoModel(ModelConfig(), recipe.dropout)
    tables = model.rope_table()
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": [model.embed.weight], "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.peak_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    muon = Muon([p for p in model.blocks.parameters() if p.ndim == 2], recipe.weight_decay)
    log(f"{sum(p.numel() for p in model.parameters())} parameters, {recipe}")
    log(f"{len(corpus.help)} help topics, {sum(len(t['questions']) for t in corpus.topics.values())} written questions")
    first = 0
    if resume and (out / "checkpoint.pt").exists():
        state = torch.load(out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        for buffer, saved in zip(muon.buffers, state["muon"], strict=True):
            buffer.copy_(saved)
        first = state["step"]
        for step in range(first):
            corpus.copying, corpus.drilling = recipe.copying(step), recipe.drilling(step)
            next(stream)

    n_seen, average, start = 0, 0.0, time.monotonic()
    model.train()
    for step in range(first, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        corpus.copying, corpus.drilling = recipe.copying(step), recipe.drilling(step)
        batch = next(stream)
        model.dropout.generator = np.random.default_rng((recipe.seed, rank, step))
        loss = batch_loss(model, tables, batch, rank, size)
        loss.backward()  # type: ignore[no-untyped-call]
        whole = sum_gradients(model, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        muon.step(recipe.rate(step))
        model.zero_grad(set_to_none=True)
        n_seen += batch.tokens.size
        average = whole if step == first else 0.97 * average + 0.03 * whole
        if (step + 1) % 20 == 0:
            rate = n_seen / (time.monotonic() - start)
            log(f"step {step + 1}/{recipe.steps} loss {average:.4f} positions {n_seen} {rate:.0f}/s")
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == recipe.steps):
            save(out / "checkpoint.pt", model, optimizer, muon, step + 1, recipe)
            shares = {
                kind: share_right(model, tables, tokenizer, some, 12 if kind == "withheld" else 400)
                for kind, some in cases.items()
            }
            log("right: " + ", ".join(f"{kind} {share:.2f}" for kind, share in shares.items()))
    log(f"done: {recipe.steps} steps, loss {average:.4f}, {n_seen} positions in {time.monotonic() - start:.0f} s")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=5769)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--threads", type=int, default=2, choices=(1, 2, 4), help="processes of one thread each")
    parser.add_argument("--withhold", type=int, default=2, help="questions of each help topic kept for measuring")
    parser.add_argument("--out", type=Path, default=HERE / "build", help="folder for checkpoint, tokenizer and log")
    parser.add_argument("--model-folder", type=Path, default=HERE, help="folder for model.gguf")
    parser.add_argument("--no-export", action="store_true", help="leave model.gguf as it is")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    recipe = Recipe(args.seed, args.steps, args.threads, args.withhold)
    if recipe.processes == 1:
        train(0, recipe, args.out, args.resume)
    else:
        spawn(train, (recipe, args.out, args.resume), nprocs=recipe.processes)  # type: ignore[no-untyped-call]
    if not args.no_export:
        export(args.out, args.model_folder)


if __name__ == "__main__":
    main()
