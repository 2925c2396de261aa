"""Takes the dashboard's pictures in `docs/`, on a desk and on a phone, of two nodes with small stand-ins at work:
`python tools/dashboard_pictures.py`. Needs Chromium.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"dashboard-desk.png": (1400, 900, True), "dashboard-phone.png": (390, 844, False)}


async def main() -> None:
    from infsvc import Client
    from tests.bert_files import random_bert, write_bert
    from tests.browser import browser
    from tests.nodes import add_worker, build, free_port
    from tests.tiny_families import write_tiny_gemma3

    demo = ROOT / "data/models/demo/model.gguf"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        encoder = write_bert(
            folder / "nomic.gguf", random_bert(n_embd=768, n_head=12, n_ctx=2048), architecture="nomic-bert"
        )
        gemma = write_tiny_gemma3(folder / "gemma.gguf")
        for home, models in (("a", ("demo", "gemma3-270m")), ("b", ("demo", "nomic-embed-v1.5"))):
            for name in models:
                path = {"demo": demo, "gemma3-270m": gemma}.get(name, encoder)
                keys = {"MODEL_FORMAT": "embedding", "CTX_SIZE": 2048} if path is encoder else {}
                (folder / home).mkdir(exist_ok=True)
                add_worker(folder / home, name, path, **keys)
        url = f"nats://127.0.0.1:{free_port()}"
        first = build(folder / "a", "demo", "gemma3-270m", nats_url=url, node="alpha", embedded_nats="auto")
        second = build(folder / "b", "demo", "nomic-embed-v1.5", nats_url=url, node="beta", embedded_nats="off")
        async with first, second, Client(first.gateway_url) as client, browser(folder / "profile") as page:
            for node, name in ((first, "demo"), (first, "gemma3-270m"), (second, "demo"), (second, "nomic-embed-v1.5")):
                await node.fleet.settled(name)
            await page.open(f"{first.gateway_url}/")
            await page.until("document.querySelectorAll('.card').length === 4")
            asked = [client.infer("What is backpressure?", model="demo", max_tokens=64) for _ in range(6)]
            await asyncio.gather(*asked)
            for name, (width, height, dark) in SIZES.items():
                await page.open(f"{first.gateway_url}/?#{width}", width=width, height=height, dark=dark)
                await page.until("document.querySelector('#connection').dataset.state === 'good'")
                await page.until("document.querySelectorAll('.card').length === 4")
                waiting = [asyncio.create_task(client.infer("hello", model="demo", max_tokens=900)) for _ in range(3)]
                await asyncio.gather(*waiting)
                await page.until("document.querySelector('#log').innerText.includes('demo')")
                await page.picture(ROOT / "docs" / name)
                print(f"docs/{name}: {(ROOT / 'docs' / name).stat().st_size // 1024} KiB")


if __name__ == "__main__":
    asyncio.run(main())
