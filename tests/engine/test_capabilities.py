"""Each claim rests on the file, and is made only where this engine keeps it."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from engine.capabilities import CapabilityClaim, detect
from engine.model_info import read_model_info
from infsvc.types import Capability
from tests.bert_files import random_bert, write_bert
from tests.tiny_families import write_tiny_reranker
from tests.tiny_models import CHATML, write_tiny_model


def claims(path: Path) -> dict[Capability, CapabilityClaim]:
    found = detect(read_model_info(path))
    assert [claim.capability for claim in found] == list(Capability)
    assert all(claim.evidence for claim in found)
    return {claim.capability: claim for claim in found}


def test_a_generative_model(tiny_model: Path) -> None:
    found = claims(tiny_model)
    assert found[Capability.TEXT_GENERATION].present
    assert found[Capability.TEXT_GENERATION].evidence == "causal attention (llama), no pooling type"
    assert not found[Capability.REASONING].present
    assert not found[Capability.TOOL_CALLING].present
    assert found[Capability.TOOL_CALLING].evidence == "the chat template has no place for tools"
    grammar = found[Capability.GRAMMAR_CONSTRAINED]
    assert (grammar.present, grammar.evidence) == (
        True,
        "a vocabulary of 259 tokens, each allowed or not at every step",
    )


@pytest.mark.parametrize("capability", [Capability.TOOL_CALLING])
def test_what_this_version_does_not_serve_is_not_claimed(tmp_path: Path, capability: Capability) -> None:
    template = CHATML + "{% if tools %}{{ tools | tojson }}{% endif %}"
    claim = claims(write_tiny_model(tmp_path / "m.gguf", chat_template=template))[capability]
    assert not claim.present
    assert "not served by this version" in claim.evidence


def test_an_embedding_model_claims_no_text(tmp_path: Path) -> None:
    found = claims(
        write_tiny_model(tmp_path / "m.gguf", pooling=1, special=("<think>",), chat_template="tools <think>")
    )
    assert not found[Capability.TEXT_GENERATION].present
    assert found[Capability.TEXT_GENERATION].evidence == "pooling type mean"
    assert found[Capability.EMBEDDINGS] == CapabilityClaim(Capability.EMBEDDINGS, True, "pooling type mean")
    assert not found[Capability.REASONING].present
    assert not found[Capability.TOOL_CALLING].present
    assert not found[Capability.GRAMMAR_CONSTRAINED].present


def test_a_generative_model_embeds_too(tiny_model: Path) -> None:
    claim = claims(tiny_model)[Capability.EMBEDDINGS]
    assert (claim.present, claim.evidence) == (True, "no pooling type: mean of hidden states")


def test_what_the_worker_file_says_is_the_evidence_where_it_counts(tiny_model: Path) -> None:
    found = {claim.capability: claim for claim in detect(read_model_info(tiny_model), pooling="cls", embeds_only=True)}
    assert found[Capability.EMBEDDINGS].evidence == "POOLING=cls in the worker file"
    text = found[Capability.TEXT_GENERATION]
    assert (text.present, text.evidence) == (False, "MODEL_FORMAT=embedding")


def test_a_reranker_orders_documents_and_does_nothing_else(tmp_path: Path, tiny_model: Path) -> None:
    found = claims(write_tiny_reranker(tmp_path / "m.gguf"))
    assert [each for each, claim in found.items() if claim.present] == [Capability.RERANKING]
    evidence = found[Capability.RERANKING].evidence
    assert evidence == "pooling type rank, and a classification head of 2 outputs"
    assert found[Capability.EMBEDDINGS].evidence.startswith("pooling type rank (a reranker")
    assert claims(tiny_model)[Capability.RERANKING].evidence == "no pooling type; a reranker's is rank"


def test_a_reranker_without_a_head_claims_nothing(tmp_path: Path, tiny_model: Path) -> None:
    for path in (
        write_tiny_model(tmp_path / "m.gguf", pooling=4),
        write_bert(tmp_path / "labels.gguf", random_bert(n_scores=3), pooling=gguf.PoolingType.RANK, labels=["a", "b"]),
    ):
        found = claims(path)
        assert not any(claim.present for claim in found.values())
        assert "no classification head" in found[Capability.EMBEDDINGS].evidence
        assert "no classification head" in found[Capability.RERANKING].evidence
    asked = {claim.capability: claim for claim in detect(read_model_info(tiny_model), pooling="rank")}
    assert asked[Capability.EMBEDDINGS].evidence.startswith("POOLING=rank in the worker file (a reranker")
    assert not asked[Capability.RERANKING].present
    assert asked[Capability.TEXT_GENERATION].present


def test_an_unknown_pooling_type_is_an_embedding_model_too(tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    from tests.engine.gguf_files import rewrite

    path = rewrite(tiny_model, tmp_path / "m.gguf", {"llama.pooling_type": (gguf.GGUFValueType.UINT32, 77)})
    assert not claims(path)[Capability.TEXT_GENERATION].present


def test_attention_that_is_not_causal(tiny_model: Path, tmp_path: Path) -> None:
    import gguf

    from tests.engine.gguf_files import rewrite

    path = rewrite(tiny_model, tmp_path / "m.gguf", {"llama.attention.causal": (gguf.GGUFValueType.BOOL, False)})
    claim = claims(path)[Capability.TEXT_GENERATION]
    assert (claim.present, claim.evidence) == (False, "attention is not causal")


def test_reasoning_by_a_token(tmp_path: Path) -> None:
    claim = claims(write_tiny_model(tmp_path / "m.gguf", special=("<think>", "</think>")))[Capability.REASONING]
    assert (claim.present, claim.evidence) == (True, "<think> is a token of the vocabulary")


def test_reasoning_by_the_template(tmp_path: Path) -> None:
    claim = claims(write_tiny_model(tmp_path / "m.gguf", chat_template=CHATML + "<think>"))[Capability.REASONING]
    assert (claim.present, claim.evidence) == (True, "the chat template writes <think>")


def test_a_form_of_reasoning_that_is_not_told_apart_is_named_and_not_claimed(tmp_path: Path) -> None:
    claim = claims(write_tiny_model(tmp_path / "m.gguf", special=("<|channel|>",)))[Capability.REASONING]
    assert not claim.present
    assert "<|channel|>" in claim.evidence


def test_what_replaces_the_chat_template_takes_its_claims_along(tmp_path: Path) -> None:
    template = CHATML + "<think>{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    info = read_model_info(write_tiny_model(tmp_path / "m.gguf", chat_template=template))
    found = {claim.capability: claim for claim in detect(info, override="prompt_template.json")}
    for capability in (Capability.REASONING, Capability.TOOL_CALLING):
        assert not found[capability].present
        assert "prompt_template.json" in found[capability].evidence
    # A token stays one, whoever writes the prompt.
    info = read_model_info(write_tiny_model(tmp_path / "t.gguf", special=("<think>",)))
    assert detect(info, override="prompt_template.json")[2].evidence == "<think> is a token of the vocabulary"


def test_no_template(tmp_path: Path) -> None:
    found = claims(write_tiny_model(tmp_path / "m.gguf", chat_template=None))
    assert found[Capability.TEXT_GENERATION].present
    assert found[Capability.TOOL_CALLING].evidence == "no chat template"


def test_tools_are_called_where_the_template_writes_a_form_that_is_parsed(tmp_path: Path) -> None:
    template = CHATML + "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    claim = claims(write_tiny_model(tmp_path / "m.gguf", chat_template=template))[Capability.TOOL_CALLING]
    assert claim.present
    assert "<tool_call>" in claim.evidence
