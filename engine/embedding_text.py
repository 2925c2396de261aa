"""From what a request brought to the token ids that an embedder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from infsvc.embedding_types import EmbeddingInput
from infsvc.errors import BadRequest

if TYPE_CHECKING:
    from engine.remote_model import Vocabulary


def token_lists(given: EmbeddingInput, model: Vocabulary) -> list[list[int]]:
    """Texts with the marks that the vocabulary puts around them; token ids as they came. Any thread, while the model is
    open.

    Raises:
        BadRequest: an id that the vocabulary does not have, or a text that has no tokens.
    """
    lists: list[list[int]] = []
    items: Sequence[str | list[int]] = [given] if isinstance(given, str) else given
    for index, item in enumerate(items):
        if isinstance(item, str):
            tokens = model.tokenize(item, add_special=True, parse_special=True)
            if not tokens:
                raise BadRequest(f"input {index} has no tokens", param="input")
        else:
            tokens = item
            if max(tokens) >= model.n_vocab:
                raise BadRequest(
                    f"input {index} holds the token id {max(tokens)}, and the vocabulary has {model.n_vocab}",
                    param="input",
                )
        lists.append(tokens)
    return lists
