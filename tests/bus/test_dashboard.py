"""The dashboard in a real browser, on two real nodes: live, safe against what the bus may say, and readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2
import nats
import pytest

from infsvc import Client
from tests.browser import Page, browser
from tests.nodes import free_port
from transports.http.dashboard import STATIC

from .conftest import Pair, connected, make_node

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"

CONTRAST = """
(() => {
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour.length < 4 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && [...each.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
    .filter((each) => !["SCRIPT", "STYLE", "NOSCRIPT", "TEMPLATE"].includes(each.tagName))
    .map((each) => {
      const a = light(rgb(getComputedStyle(each).color)), b = light(behind(each));
      return [each.className || each.tagName, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    })
    .filter(([, ratio]) => ratio < 4.5);
})()
"""

WIDER_THAN_THE_SCREEN = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def card(model: str, node: str) -> str:
    name, of = json.dumps(model), json.dumps(f"@{node}")
    return (
        "[...document.querySelectorAll('.card')].find((each) => "
        f"each.querySelector('.name').textContent === {name} && each.querySelector('.node').textContent === {of})"
    )


async def is_live(page: Page) -> None:
    await page.until("document.querySelector('#connection').dataset.state === 'good'")


async def test_every_node_live_and_nothing_from_the_bus_is_markup(pair: Pair, tmp_path: Path) -> None:
    gateway = pair.alpha.gateway_url
    async with browser(tmp_path / "profile") as page, Client(gateway) as client:
        await page.open(gateway + "/")
        await is_live(page)
        for model, node in (("tiny", "alpha"), ("tiny", "beta"), ("only-v1.5", "beta")):
            await page.until(f"{card(model, node)}?.querySelector('.state').textContent === 'online'")
        text = await page.run(f"{card('tiny', 'alpha')}.innerText")
        for shown in ("llama", "16,384 tokens", "inference.request.tiny", "healthy", "0 of 16 waiting", "✓ text-gen"):
            assert shown in text
        assert pair.alpha.fleet.get("tiny").endpoint in text
        matrix = "[...document.querySelectorAll('#matrix tbody tr')].map((row) => row.innerText.replaceAll('\\t', ' '))"
        assert "tiny @beta ✓ ✓ · · ✓" in await page.run(matrix)
        # What happens shows without a reload: a request, and another node's model that goes.
        await client.infer("hello", model="tiny", req_id="seen-here", max_tokens=2)
        await page.until("document.querySelector('#log').innerText.includes('seen-here: ')")
        await pair.beta.unload("only-v1.5")
        await page.until(f"{card('only-v1.5', 'beta')}.querySelector('.state').textContent === 'offline'")
        # What does not run is not said to be healthy.
        assert await page.run(f"{card('only-v1.5', 'beta')}.querySelector('.queue').hidden")
        assert "tok/s" not in await page.run(f"{card('only-v1.5', 'beta')}.innerText")
        # A stranger on the bus says markup.
        found = pair.alpha.registry.find("tiny")
        assert found is not None
        document: dict[str, Any] = found.model_dump() | {"model_name": HOSTILE, "node": HOSTILE, "reason": HOSTILE}
        nc = await nats.connect(pair.url)
        await nc.publish("models.evil.heartbeat", json.dumps(document).encode())
        await nc.publish("monitoring.alerts", json.dumps({"node": HOSTILE, "model": HOSTILE, "msg": HOSTILE}).encode())
        await nc.close()
        await page.until(f"{card(HOSTILE, HOSTILE)} !== undefined")
        await page.until(f"document.querySelector('#log').innerText.includes({json.dumps(HOSTILE)})")
        assert await page.run("document.images.length") == 0
        assert await page.run("document.title") == "infsvc"
        # The filter.
        await page.run("document.querySelector('#filter').focus()")
        await page.type("@beta offline")
        await page.until("[...document.querySelectorAll('.card')].filter((each) => !each.hidden).length === 1")
        assert page.complaints == []


async def test_dead_letters_are_counted_with_where_to_look(pair: Pair, tmp_path: Path) -> None:
    gateway = pair.alpha.gateway_url
    async with browser(tmp_path / "profile") as page:
        await page.open(gateway + "/")
        await is_live(page)
        assert await page.run("document.querySelector('#dead').hidden")
        nc = await nats.connect(pair.url)
        await nc.jetstream().publish("inference.queue.tiny", b"nonsense")
        await nc.close()
        await page.until("document.querySelector('#dead').innerText.includes('1 request could not be answered and is')")
        assert "infsvc queue dead" in await page.run("document.querySelector('#dead').innerText")
        assert await page.run(CONTRAST) == []
        # Who comes later sees it too.
        await page.open(gateway + "/?")
        await page.until("!document.querySelector('#dead').hidden")
        (letter,) = await pair.alpha.durable.dead.page()
        await pair.beta.durable.dead.delete(letter.id)
        await page.until("document.querySelector('#dead').hidden")
        assert page.complaints == []


@pytest.mark.parametrize("dark", [True, False], ids=["dark", "light"])
async def test_readable_on_a_desk_and_on_a_phone(pair: Pair, tmp_path: Path, dark: bool) -> None:
    gateway = pair.alpha.gateway_url
    async with browser(tmp_path / "profile") as page:
        for width, height in ((1400, 900), (390, 844)):
            await page.open(f"{gateway}/?", width=width, height=height, dark=dark)
            await is_live(page)
            await page.until(f"{card('only-v1.5', 'beta')} !== undefined")
            await page.picture(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")
            assert await page.run(CONTRAST) == []
            assert not await page.run(WIDER_THAN_THE_SCREEN)
        # By keyboard alone: the first stop skips to the models, and the theme button turns.
        await page.press("Tab")
        assert await page.run("document.activeElement.className") == "skip"
        await page.press("Tab")
        assert await page.run("document.activeElement.id") == "theme"
        await page.press("Enter")
        assert await page.run("document.documentElement.dataset.theme") == "dark"
        assert page.complaints == []


async def test_a_key_is_asked_for_once_and_kept_in_the_tab(tmp_path: Path, long_model: Path) -> None:
    url = f"nats://127.0.0.1:{free_port()}"
    node = make_node(tmp_path / "a", long_model, url, "alpha", "tiny", api_keys="right")
    async with node, browser(tmp_path / "profile") as page:
        await connected(node.events)
        await node.fleet.settled("tiny")
        await page.open(node.gateway_url + "/")
        for key in ("wrong", "right"):
            await page.until("!document.querySelector('#key-form').hidden && document.activeElement.id === 'key'")
            await page.type(key)
            await page.press("Enter")
            await page.until("document.querySelector('#key').value === ''")
        await is_live(page)
        await page.until(f"{card('tiny', 'alpha')} !== undefined")
        assert await page.run("document.querySelector('#key-form').hidden")
        await page.open(f"{node.gateway_url}/?")
        await is_live(page)
        assert await page.run("localStorage.getItem('infsvc-api-key')") is None
        async with httpx2.AsyncClient(base_url=node.gateway_url, trust_env=False) as http:
            # The page says nothing of the node; everything else still needs the key.
            assert (await http.get("/", headers={"Accept": "text/html"})).status_code == 200
            for path, accept in (("/", "*/*"), ("/", "application/json, text/html"), ("/api/services", "text/html")):
                assert (await http.get(path, headers={"Accept": accept})).status_code == 401


async def test_who_gets_the_page_and_who_the_index(pair: Pair) -> None:
    async with httpx2.AsyncClient(base_url=pair.alpha.gateway_url, trust_env=False) as http:
        for accept, kind in (
            ("text/html,application/xhtml+xml,*/*;q=0.8", "text/html"),
            ("*/*", "application/json"),
            ("application/json", "application/json"),
            ("application/json, text/html", "application/json"),
        ):
            response = await http.get("/", headers={"Accept": accept})
            assert response.headers["content-type"].startswith(kind)
            assert response.headers["vary"] == "Accept"
        page = await http.get("/", headers={"Accept": "text/html"})
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        for name in ("dashboard.js", "dashboard.css", "icon.svg"):
            assert f"/dashboard/{name}" in page.text
            response = await http.get(f"/dashboard/{name}")
            assert response.content == (STATIC / name).read_bytes()
        assert "style=" not in page.text
        assert (await http.get("/dashboard/../app.py")).status_code == 404
        rebound = await http.get("/", headers={"Accept": "text/html", "Host": "evil.example"})
        assert rebound.status_code == 403
