"""A request as its reader sees it, event by event."""

from __future__ import annotations

from engine.generation import Generation
from engine.harmony_output import HarmonyParser
from engine.sequence import Sequence, SequenceFinished, SequenceStarted, TokenEmitted
from engine.service import InferenceRequest
from tests.engine.parts import sequence


def generation(cancelled: list[Sequence], *, final: bool) -> tuple[Generation, Sequence]:
    made = Generation(
        InferenceRequest(model="a", input="x"),
        formatted="x",
        tokens_in=1,
        parser=HarmonyParser(final=final),
        cancel=cancelled.append,
        on_token=lambda: None,
        on_done=lambda _: None,
    )
    each = sequence(made.on_event)
    made.attach(each)
    made.on_event(SequenceStarted(each, 0.0, 0))
    return made, each


async def test_an_answer_that_is_complete_ends_the_sequence_and_takes_nothing_more() -> None:
    for reason in ("cancelled", "length"):
        cancelled: list[Sequence] = []
        made, each = generation(cancelled, final=True)
        for text in ("Yes", ".<|end|>", "<|start|>", "user"):
            made.on_event(TokenEmitted(each, 1.0, text))
        assert cancelled == [each]
        made.on_event(SequenceFinished(each, 2.0, "more", reason))
        reply = await made.result()
        assert (reply.text, reply.tokens_out, reply.finish_reason) == ("Yes.", 2, "stop")


async def test_one_that_is_not_complete_ends_as_the_sequence_does() -> None:
    made, each = generation([], final=False)
    made.on_event(TokenEmitted(each, 1.0, "<|channel|>analysis<|message|>Hm.<|end|>"))
    made.on_event(SequenceFinished(each, 2.0, "", "cancelled"))
    reply = await made.result()
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("", "Hm.", "cancelled")
