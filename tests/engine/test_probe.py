"""The probe decodes in a child process, once, and believes only what it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.probe import probe
from infsvc.errors import LoadError


async def test_this_build_decodes_and_the_answer_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "probe.json"
    answer = await probe(tiny_model, cache)
    kept = json.loads(cache.read_text())
    assert kept["use_extra_bufts"] is answer.use_extra_bufts
    assert kept["flash_attention"] is answer.flash_attention
    # The second time no file is decoded: there is none.
    assert await probe(tmp_path / "missing.gguf", cache) == answer


@pytest.mark.parametrize("damage", ["[]", "partial"])
async def test_what_cannot_be_decoded_and_a_damaged_cache(tmp_path: Path, tiny_model: Path, damage: str) -> None:
    cache = tmp_path / "probe.json"
    if damage == "partial":
        await probe(tiny_model, cache)
        damage = json.dumps({"key": json.loads(cache.read_text())["key"]})
    cache.write_text(damage)
    with pytest.raises(LoadError, match="make build-llama"):
        await probe(tmp_path / "missing.gguf", cache)
