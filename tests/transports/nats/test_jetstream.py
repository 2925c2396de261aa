"""Calls to a real broker's JetStream, and their ends."""

from __future__ import annotations

import asyncio

import pytest
from nats.aio.msg import Msg

from .conftest import Doors


async def test_a_call_that_is_cancelled_as_its_answer_comes_is_cancelled(doors: Doors) -> None:
    """A cancel that is lost leaves a loop of calls running, and who waits for its end waits for ever."""
    nc = doors.bus.nc
    assert nc is not None
    call = asyncio.create_task(doors.durable.js.call("INFO"))
    before = set(nc._resp_map)
    async with asyncio.timeout(5):
        while not (tokens := set(nc._resp_map) - before):
            await asyncio.sleep(0)
    nc._resp_map[tokens.pop()].set_result(Msg(nc, "inbox", data=b"{}"))
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_a_call_is_answered(doors: Doors) -> None:
    assert (await doors.durable.js.call("INFO"))["type"].endswith("account_info_response")
