"""What a model can do, each claim with the evidence it rests on; read from the file's header, never guessed from a
name.

A capability is present only when the file has it and this engine serves it, so that a claim can be relied on.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.harmony import CHANNEL
from engine.model_info import ModelInfo
from engine.tool_calls import form_of
from infsvc.types import Capability

# The mark that `engine.output` can tell apart, and those it cannot (the first only in harmony).
_THINK_MARK = "<think>"
_OTHER_THINK_MARKS = (str(CHANNEL), "[THINK]", "<|START_THINKING|>", "<seed:think>")


@dataclass(frozen=True)
class CapabilityClaim:
    """Whether a capability is there, and why it is said so."""

    capability: Capability
    present: bool
    evidence: str


_POOLED = ("mean", "cls", "last")


def _pooling(info: ModelInfo, asked: str) -> str:
    return asked if asked != "auto" else info.pooling or "mean"


def pooling_of(info: ModelInfo, asked: str = "auto") -> str | None:
    """How hidden states become one vector, or a score (rank): as POOLING says, else as the file says, else their mean;
    None for a type that yields neither, as rank without a classification head."""
    pooling = _pooling(info, asked)
    return pooling if pooling in _POOLED or (pooling == "rank" and info.n_scores) else None


def detect(
    info: ModelInfo,
    *,
    pooling: str = "auto",
    embeds_only: bool = False,
    harmony: bool = False,
    extract_final: bool = True,
    override: str | None = None,
) -> tuple[CapabilityClaim, ...]:
    """One claim for each capability, in the enum's order.

    Args:
        pooling: the worker file's POOLING.
        embeds_only: whether it says MODEL_FORMAT=embedding.
        harmony: whether the model is asked in harmony.
        extract_final: the worker file's HARMONY_EXTRACT_FINAL.
        override: the file that stands in for the chat template, if there is one.
    """
    generates = info.pooling is None and info.causal and not embeds_only
    claims = {
        Capability.TEXT_GENERATION: _text(info, generates, embeds_only),
        Capability.EMBEDDINGS: _embeddings(info, pooling),
        Capability.REASONING: _reasoning(info, generates, harmony, extract_final, override),
        Capability.TOOL_CALLING: _tools(info, generates, harmony, override),
        Capability.GRAMMAR_CONSTRAINED: _grammar(info, generates),
        Capability.RERANKING: _reranking(info, pooling),
    }
    return tuple(CapabilityClaim(capability, *claims[capability]) for capability in Capability)


def _text(info: ModelInfo, generates: bool, embeds_only: bool) -> tuple[bool, str]:
    if generates:
        return True, f"causal attention ({info.architecture}), no pooling type"
    if info.pooling:
        return False, f"pooling type {info.pooling}"
    return False, "MODEL_FORMAT=embedding" if embeds_only else "attention is not causal"


def _embeddings(info: ModelInfo, asked: str) -> tuple[bool, str]:
    if _pooling(info, asked) == "rank":
        told = "pooling type rank" if asked == "auto" else "POOLING=rank in the worker file"
        but = "" if info.n_scores else "; and the file has no classification head to compute it"
        return False, f"{told} (a reranker: it answers with a score, at /v1/rerank){but}"
    if asked != "auto":
        return True, f"POOLING={asked} in the worker file"
    if info.pooling is None:
        return True, "no pooling type: mean of hidden states"
    if pooling_of(info) is None:
        return False, f"pooling type {info.pooling}; not served by this version"
    return True, f"pooling type {info.pooling}"


def _reranking(info: ModelInfo, asked: str) -> tuple[bool, str]:
    if _pooling(info, asked) != "rank":
        told = f"pooling type {info.pooling}" if info.pooling else "no pooling type"
        return False, f"{told if asked == 'auto' else f'POOLING={asked} in the worker file'}; a reranker's is rank"
    if not info.n_scores:
        return False, "pooling type rank, and no classification head in the file"
    outputs = f"{info.n_scores} output{'s' if info.n_scores > 1 else ''}"
    return True, f"pooling type rank, and a classification head of {outputs}"


def _reasoning(
    info: ModelInfo, generates: bool, harmony: bool, extract_final: bool, override: str | None
) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    if harmony and not extract_final:
        return False, "HARMONY_EXTRACT_FINAL=false: the analysis stays in the text"
    if harmony:
        return True, f"{CHANNEL} is a token of the vocabulary: harmony's analysis channel"
    for mark in (_THINK_MARK, *_OTHER_THINK_MARKS):
        served = mark == _THINK_MARK
        but = "" if served else "; this form of reasoning is not told apart by this version"
        if mark in info.special_tokens:
            return served, f"{mark} is a token of the vocabulary{but}"
        if not override and info.chat_template and mark in info.chat_template:
            return served, f"the chat template writes {mark}{but}"
    template = f"{override}, which replaces the chat template," if override else "chat template"
    return False, f"neither vocabulary nor {template} know a mark of reasoning"


def _grammar(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    if not info.n_vocab:
        return False, "the file has no vocabulary"
    return True, f"a vocabulary of {info.n_vocab} tokens, each allowed or not at every step"


def _tools(info: ModelInfo, generates: bool, harmony: bool, override: str | None) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    if harmony:
        return True, f"{CHANNEL} is a token of the vocabulary: harmony's calls in the commentary channel"
    if override:
        return False, f"{override} replaces the chat template and has no place for tools"
    if not info.chat_template:
        return False, "no chat template"
    if "tools" not in info.chat_template:
        return False, "the chat template has no place for tools"
    found = form_of(info.chat_template)
    if found is not None:
        form, mark = found
        return True, f"the chat template lists tools and writes {mark} (the form of {form.name})"
    return False, "the chat template lists tools; this form of tool call is not served by this version"
