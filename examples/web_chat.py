"""A chat in the browser over OpenAI's API, in one file: a page and a proxy to the node.

python examples/web_chat.py [--url http://127.0.0.1:5780] [--model demo] [--port 8090]; then open http://127.0.0.1:8090
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>chat with infsvc</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui }
  body { max-width: 44rem; margin: auto; padding: 1rem } .you { opacity: .7 } p { white-space: pre-wrap }
  form { display: flex; gap: .5rem; position: sticky; bottom: 1rem } input { flex: 1; font: inherit; padding: .5rem }
</style>
<h1>infsvc</h1><main aria-live="polite"></main>
<form><input autofocus aria-label="message" placeholder="ask something"><button>Send</button></form>
<script>
const messages = [], main = document.querySelector("main"), form = document.querySelector("form")
function show(who, text) {
  const p = document.createElement("p"); p.className = who; p.textContent = text; main.append(p); return p
}
form.onsubmit = async event => {
  event.preventDefault()
  const input = form.querySelector("input"), text = input.value.trim()
  if (!text) return
  input.value = ""
  messages.push({role: "user", content: text}); show("you", text)
  const answer = show("model", ""), response = await fetch("/chat", {method: "POST", body: JSON.stringify(messages)})
  if (!response.ok) { answer.textContent = (await response.json()).error.message; return }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let rest = ""
  for (;;) {
    const {value, done} = await reader.read()
    if (done) break
    const lines = (rest + value).split("\\n"); rest = lines.pop()
    for (const line of lines) if (line.startsWith("data: {"))
      answer.textContent += JSON.parse(line.slice(6)).choices?.[0]?.delta?.content ?? ""
  }
  messages.push({role: "assistant", content: answer.textContent})
}
</script></html>"""


def app(url: str, model: str) -> Starlette:
    """The page, and `/chat`, which streams the node's answer on."""
    client = httpx2.AsyncClient(base_url=url, timeout=300, trust_env=False)

    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE)

    async def chat(request: Request) -> Response:
        body = {"model": model, "messages": await request.json(), "stream": True}
        upstream = await client.send(client.build_request("POST", "/v1/chat/completions", json=body), stream=True)
        if upstream.is_error:
            await upstream.aread()
            return JSONResponse(upstream.json(), status_code=upstream.status_code)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                async for chunk in upstream.aiter_bytes():
                    yield chunk
            finally:
                await upstream.aclose()

        return StreamingResponse(chunks(), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(routes=[Route("/", page), Route("/chat", chat, methods=["POST"])], lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:5780")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--port", type=int, default=8090)
    options = parser.parse_args()
    uvicorn.run(app(options.url, options.model), host="127.0.0.1", port=options.port)


if __name__ == "__main__":
    main()
