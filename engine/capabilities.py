"""What a model can do, each claim with the evidence it rests on; read from the file's header, never guessed from a
name.

A capability is present only when the file has it and this engine serves it, so that a claim can be relied on.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_info import ModelInfo
from infsvc.types import Capability

# The mark that `engine.output` can tell apart, and those it cannot yet.
_THINK_MARK = "<think>"
_TOOL_MARK = "<tool_call>"
_OTHER_THINK_MARKS = ("<|channel|>", "[THINK]", "<|START_THINKING|>", "<seed:think>")


@dataclass(frozen=True)
class CapabilityClaim:
    """Whether a capability is there, and why it is said so."""

    capability: Capability
    present: bool
    evidence: str


def detect(info: ModelInfo) -> tuple[CapabilityClaim, ...]:
    """One claim for each capability, in the enum's order."""
    generates = info.pooling is None and info.causal
    claims = {
        Capability.TEXT_GENERATION: _text(info, generates),
        Capability.EMBEDDINGS: _embeddings(info, generates),
        Capability.REASONING: _reasoning(info, generates),
        Capability.TOOL_CALLING: _tools(info, generates),
        Capability.GRAMMAR_CONSTRAINED: _grammar(info, generates),
    }
    return tuple(CapabilityClaim(capability, *claims[capability]) for capability in Capability)


def _text(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    if generates:
        return True, f"causal attention ({info.architecture}), no pooling type"
    return False, f"pooling type {info.pooling}" if info.pooling else "attention is not causal"


def _embeddings(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    source = "no pooling type: mean of hidden states" if generates else f"pooling type {info.pooling or 'none'}"
    return False, f"{source}; embeddings are not served by this version"


def _reasoning(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    for mark in (_THINK_MARK, *_OTHER_THINK_MARKS):
        served = mark == _THINK_MARK
        but = "" if served else "; this form of reasoning is not told apart by this version"
        if mark in info.special_tokens:
            return served, f"{mark} is a token of the vocabulary{but}"
        if info.chat_template and mark in info.chat_template:
            return served, f"the chat template writes {mark}{but}"
    return False, "neither vocabulary nor chat template know a mark of reasoning"


def _grammar(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    if not info.n_vocab:
        return False, "the file has no vocabulary"
    return True, f"a vocabulary of {info.n_vocab} tokens, each allowed or not at every step"


def _tools(info: ModelInfo, generates: bool) -> tuple[bool, str]:
    if not generates:
        return False, "generates no text"
    if not info.chat_template:
        return False, "no chat template"
    if "tools" not in info.chat_template:
        return False, "the chat template has no place for tools"
    if _TOOL_MARK in info.chat_template:
        return True, f"the chat template lists tools and writes {_TOOL_MARK}"
    return False, "the chat template lists tools; this form of tool call is not served by this version"
