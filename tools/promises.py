"""Writes `docs/promises.md`: what the README of the Go service promised that this project replaces, the command that
keeps it here, and what that command really answers.

`python tools/promises.py` starts a node, runs every row and writes the page; it takes about five minutes. Words behind
the command run only the rows whose promise holds one of them, and write nothing. The node has the documented ports
(5700, 5769 to 5780, 8080) when all are free, else others, and the page shows the documented ones.

A model that would have to be fetched has a stand-in under its name: the demo model's weights for gemma3 and qwen3, which
are fetched from a hub on this machine; a tiny file of gpt-oss's architecture that says what is written for it; random
weights of the same architecture for those that embed.
"""

from __future__ import annotations

import re
import socket
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.commands import Place

TARGET = ROOT / "docs/promises.md"
SHOWN_CHARACTERS = 240
PORTS = {
    "demo": 5769, "gemma3-270m": 5770, "qwen3-4b": 5771, "gpt-oss-20b": 5772, "nomic-embed-v1.5": 5778,
    "nomic-embed-v2-moe": 5779,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One promise.

    Attributes:
        promised: the first README's words or command, as Markdown.
        here: the shell lines that keep it; empty when nothing on this machine can.
        note: what is special: a stand-in, why it was not run, the test or page that shows it.
        pick: a regular expression; what it finds in the output is shown in the output's place.
        run: whether the lines were run for the page.
        first: whether they run before all others, which build on them.
    """

    promised: str
    here: str = ""
    note: str = ""
    pick: str = ""
    run: bool = True
    first: bool = False


def ask(model: str, body: str, path: str = "/v1/completions", more: str = "") -> str:
    return f"curl -s localhost:{PORTS[model]}{path} {more}-d '{body}'"


NO_GPU = "no GPU and no Mac here: shown is what the compiler would be told"
NO_DOCKER = "no container engine runs here: the steps were run by hand, as [operations](operations.md#docker) tells"
LOCAL_HUB = "from a hub on this machine, which hung up in the middle once"
STAND_IN = "a stand-in's weights under this name"

EVENTS = (
    "sleep 0.5 && "
    + ask("demo", '{"input": "hi"}')
    + " >/dev/null & curl -sN --max-time 2 localhost:5780/api/events || true"
)

FLOOD = (
    "for n in $(seq 16); do "
    + ask("qwen3-4b", '{"input": "hi", "params": {"max_tokens": 900, "ignore_eos": true}}')
    + " >/dev/null & done; wait"
)
HARMONY = (
    "curl -s localhost:5780/v1/chat/completions -d "
    """'{"model": "gpt-oss-20b", "messages": [{"role": "user", "content": "Who are you?"}], "reasoning_effort": "high"}'"""
    " | jq -c '.choices[0].message | {content, reasoning}'; sleep 0.2; sqlite3 data/logs/gpt-oss-20b.sqlite "
    '"SELECT substr(formatted_input, 10, 180) FROM requests ORDER BY ts DESC LIMIT 1"'
)
TEMPLATE = (
    "mkdir -p data/models/own && cp data/models/gemma3-270m/model.gguf data/models/own/; "
    """printf '{"name": "Gemma-3", "user_prefix": "<start_of_turn>user\\\\n", "user_suffix": "<end_of_turn>\\\\n", """
    """"model_prefix": "<start_of_turn>model\\\\n", "model_suffix": ""}' > data/models/own/prompt_template.json; """
    "printf 'MODEL_FORMAT=template\\nCTX_SIZE=512\\n' > envs/worker.own.env; infsvc start own; "
    "infsvc chat -m own --input hello >/dev/null; sleep 0.2; "
    'sqlite3 data/logs/own.sqlite "SELECT formatted_input FROM requests"'
)
TWO_NODES = (
    "INFSVC_HOME=$PWD/beta INFSVC_NODE=beta INFSVC_GATEWAY=:0 INFSVC__DEMO__HTTP_ADDR=:0 infsvc serve --quiet demo & "
    "until infsvc status | grep -q 'demo *beta *online'; do sleep 0.2; done; "
    """seq 24 | xargs -P 24 -I N infsvc req inference.request.demo '{"req_id": "spread-N", "input": "hi", """
    """"params": {"max_tokens": 400, "ignore_eos": true}}' >/dev/null; sleep 0.2; """
    "for home in . beta; do sqlite3 $home/data/logs/demo.sqlite "
    """"SELECT rtrim(worker_id, '-0123456789'), count(*) FROM requests WHERE req_id LIKE 'spread-%' AND status = 'ok'"; done; """
    "kill $!; wait $! || true"
)

SECTIONS: dict[str, list[Row]] = {
    "Features": [
        Row("GPU: CUDA", "make -n build-llama-cuda | grep -o 'DGGML_CUDA=ON'", NO_GPU),
        Row("GPU: Metal", "make -n build-llama-metal | grep -o 'DGGML_METAL=ON'", NO_GPU),
        Row("Distributed inference over NATS JetStream",
            """infsvc pub -J inference.queue.demo '{"req_id": "p-1", "input": "hello"}'"""),
        Row("Several models: Gemma 3, Qwen 3, gpt-oss", "infsvc status", "stand-ins' weights under the last five names",
            pick=r"(?s).*"),
        Row("Capabilities detected: text, embeddings, reasoning, tool-calling", "curl -s localhost:5780/api/services/demo",
            "each with the evidence in the model's file", pick=r'"capabilities":\[[^\]]*\]'),
        Row("Real-time monitoring: dashboard and command line", "timeout 3 infsvc monitor --plain || true", pick=r"(?m)^.*demo.*$"),
        Row("A client package to import",
            "python -c 'from infsvc import Client; print(sorted(n for n in dir(Client) if n[0] != \"_\"))'",
            "Python in Go's place"),
        Row("Raw and formatted modes", ask("demo", '{"input": "Hello", "raw": true, "params": {"max_tokens": 8}}')),
        Row("Health checks and performance metrics", "curl -s localhost:5780/metrics", pick=r"(?m)^infsvc_e2e_request_latency_seconds_count.*$"),
        Row("Proper error handling", ask("demo", '{"input": "hi", "params": {"temperature": 9}}') + " || true",
            "a status that means it: here 400"),
        Row("Time-outs", """infsvc req --timeout 0.01 inference.request.demo '{"input": "hi", "params": {"max_tokens": 400, "ignore_eos": true}}' || true"""),
        Row("Logging", "grep model.loaded data/logs/node.jsonl | head -1"),
        Row("Layers: HTTP and NATS handlers, service, repository, SQLite", "lint-imports",
            "the direction of imports, a part of `make check`; [architecture](architecture.md)", pick="Contracts: .*"),
    ],
    "Models": [
        *(
            Row(f"{name}, {size}, port {PORTS[name]}, `{kind}.request.{name}`, {form}",
                f"infsvc models show {name} | grep -E '^(source|endpoint|subject|context)'", STAND_IN)
            for name, size, kind, form in (
                ("gemma3-270m", "235 MB", "inference", "Gemma-3 prompts"),
                ("qwen3-4b", "2.32 GB", "inference", "ChatML"),
                ("gpt-oss-20b", "about 20 GB", "inference", "OpenAI's format"),
                ("nomic-embed-v1.5", "261 MB", "embedding", "English, 768 dimensions"),
                ("nomic-embed-v2-moe", "913 MB", "embedding", "101 languages, 768 dimensions"),
            )
        ),
        Row("Models are downloaded on first use", "make start WORKER=gemma3-270m", LOCAL_HUB, first=True),
    ],
    "Install and start": [
        Row("`make build-llama` finds the GPU", "make -n build-llama | grep -o 'CMAKE_ARGS=.*pip wheel'", "not compiled anew"),
        Row("`make build-all`", "make -n build-all; echo \"exit $?\"", "everything is installed here"),
        *(Row(f"`make start WORKER={name}`", f"make start WORKER={name}", STAND_IN) for name in ("gemma3-270m", "qwen3-4b", "gpt-oss-20b")),
        *(Row(f"`make {name}`", f"make {name}", STAND_IN) for name in ("gemma3-270m", "qwen3-4b", "gpt-oss-20b", "nomic-embed-v1.5", "nomic-embed-v2-moe")),
        Row("The first run shows the download's progress", "infsvc models pull qwen3-4b && infsvc start qwen3-4b", LOCAL_HUB, first=True),
        Row("Later runs start at once", "make start WORKER=demo"),
    ],
    "HTTP": [
        Row("`curl -X POST :5770/v1/completions`: input, temperature",
            ask("gemma3-270m", '{"input": "Explain machine learning", "params": {"temperature": 0.7}}', more='-X POST -H "Content-Type: application/json" '), STAND_IN),
        Row("… with max_tokens and `\"grammar\": \"code\"`",
            ask("gemma3-270m", '{"input": "Write a function to sort an array", "params": {"max_tokens": 500, "temperature": 0.3, "grammar": "code"}}'), STAND_IN),
    ],
    "NATS": [
        Row("`nats-chat -subject … -input …`", 'infsvc chat -s inference.request.qwen3-4b --input "What is quantum computing?"', STAND_IN),
        Row("`nats-chat -subject … -i`", "printf 'hello\\nWhat is 2 + 2?\\n' | infsvc chat -s inference.request.gemma3-270m -i", STAND_IN),
        Row("`nats-chat … -max-tokens 1000 -temperature 0.1`",
            'infsvc chat -s inference.request.gpt-oss-20b --input "Explain neural networks" --max-tokens 1000 --temperature 0.1', STAND_IN),
        Row("`nats req inference.request.gemma3-270m`: the reply is the answer",
            """echo '{"req_id": "manual-req-123", "input": "Hello, world!", "params": {"max_tokens": 50, "temperature": 0.7}}' | infsvc req inference.request.gemma3-270m --timeout 30""", STAND_IN),
        Row("`nats req …` with `\"raw\": true`",
            """echo '{"req_id": "manual-raw-456", "input": "Hello", "params": {"max_tokens": 20}, "raw": true}' | infsvc req inference.request.qwen3-4b --timeout 30""", STAND_IN),
    ],
    "Embeddings": [
        Row("`curl :5778/v1/embeddings`", ask("nomic-embed-v1.5", '{"input": "search_query: machine learning", "model": "nomic-embed-v1.5"}', "/v1/embeddings"), STAND_IN),
        Row("`curl :5779/v1/embeddings`: another language", ask("nomic-embed-v2-moe", '{"input": "Hola mundo", "model": "nomic-embed-v2-moe"}', "/v1/embeddings"), STAND_IN),
        Row("Several inputs", ask("nomic-embed-v1.5", '{"input": ["Hello world", "Machine learning", "Artificial intelligence"], "model": "nomic-embed-v1.5"}', "/v1/embeddings"), STAND_IN, pick=r'"index":2.*'),
        Row("`nats-embed -input …`", 'infsvc embed --input "search_query: machine learning" --dimensions 4', STAND_IN),
        Row("`nats-embed -subject … -model …`",
            'infsvc embed -s embedding.request.nomic-embed-v2-moe --input "Bonjour le monde" -m nomic-embed-v2-moe --dimensions 4', STAND_IN),
        Row("`nats req embedding.request.nomic-embed-v1.5` with `reply_to`",
            """echo '{"req_id": "embed-123", "input": "Hello world", "model": "nomic-embed-v1.5", "reply_to": "embed.reply.test"}' | infsvc req embedding.request.nomic-embed-v1.5 --server nats://127.0.0.1:5700 --timeout 10""", STAND_IN),
        Row("The response: `object, data, model, usage`", ask("nomic-embed-v1.5", '{"input": "Hello world"}', "/v1/embeddings"), STAND_IN, pick=r'"index":0.*'),
    ],
    "Grammars": [
        Row("Create: the `json-schema` example, whose text ends in `...`",
            ask("gemma3-270m", r'{"name": "json-schema", "description": "JSON object validator", "content": "root ::= object\nobject ::= \"{\" ws \"}\" ..."}', "/grammars") + " || true",
            "refused with its place: it is no grammar"),
        Row("Create, with a whole one",
            ask("gemma3-270m", r'{"name": "json-schema", "description": "JSON object validator", "content": "root ::= \"{\" ws \"\\\"name\\\": \\\"\" [a-z]{1,12} \"\\\"\" ws \"}\"\nws ::= \" \"?"}', "/grammars")),
        Row("List", "curl -s localhost:5770/grammars"),
        Row("Use by name", ask("gemma3-270m", '{"input": "Generate a JSON user profile", "params": {"grammar": "json-schema", "temperature": 0.1}}'), STAND_IN),
    ],
    "Make": [
        Row("`make build`", "make -n build; echo \"exit $?\"", "installed here"),
        Row("`make build-cli`", "make -n build-cli; echo \"exit $?\"", "installed here"),
        Row("`make build-monitor`", "make -n build-monitor; echo \"exit $?\"", "installed here"),
        Row("`make list-workers`", "make list-workers"),
        Row("`make stop WORKER=name`", "make stop WORKER=gpt-oss-20b; make start WORKER=gpt-oss-20b"),
        Row("`make stop`", "make stop", "run at the end", run=False),
        Row("`make test WORKER=name`", "make test WORKER=demo"),
        Row("`make logs WORKER=name`", "timeout 2 make logs WORKER=demo || true", pick=r"(?m)^.*ok .*$"),
        Row("`make monitor-status`", "make monitor-status", pick=r"(?s)^.*?demo[^\n]*"),
        Row("`make monitor-cli`", "(sleep 8; printf q) | script -qec 'stty cols 160 rows 20; make monitor-cli' /dev/null", "a full screen, as a terminal gets it", pick=r"demo +alpha[^\n]*ms[^\n]*"),
        Row("`make monitor-dashboard` on 8080", "make monitor-dashboard >/dev/null & until curl -s localhost:8080/ -H 'Accept: text/html'; do sleep 0.2; done; kill $!; wait || true",
            "live in a real browser: `tests/bus/test_dashboard.py`", pick=r"<title>.*</title>"),
        Row("`make help`", "make help", pick=r"(?m)^  start .*$"),
    ],
    "Watching": [
        Row("Live updates by server-sent events", EVENTS, pick=r"(?m)^data: .*request.finished.*$"),
        Row("Capability matrix, response times, last seen on the dashboard",
            "python -m tests.browser http://localhost:5780/", "as a browser shows it; the picture is in the README", pick=r"(?s)demo\s.*?last seen.*?\n.*?\n"),
        Row("Architecture detection (gemma3, qwen3, gpt-oss, nomic-bert)", "curl -s localhost:5780/api/services/nomic-embed-v1.5",
            "of all four: `tests/engine/test_capabilities.py`", pick=r'"architecture":"[^"]*"'),
        Row("Parameter counts", "curl -s localhost:5780/api/services/demo", pick=r'"parameter_count":"[^"]*"'),
        Row("`curl :5780/api/services`", "curl -s localhost:5780/api/services | jq -c '.services[] | [.model_name, .status, .response_time_ms]'"),
        Row("`curl :5780/api/services/gemma3-270m`", "curl -s localhost:5780/api/services/gemma3-270m | jq -c keys", STAND_IN),
        Row("`curl -N :5780/api/events`", EVENTS, pick=r"(?m)^data: .*request.started.*$"),
        Row("`queue_metrics`, `backpressure_status`", "curl -s localhost:5780/api/services/qwen3-4b | jq -c '{queue_metrics, backpressure_status}'", STAND_IN),
        Row("`first_seen`, `uptime`", "curl -s localhost:5780/api/services/qwen3-4b | jq -c '{first_seen, last_seen, uptime}'", STAND_IN),
    ],
    "Health and load": [
        *(Row(f"`nats req models.{name}.health`", f"echo '{{}}' | infsvc req models.{name}.health --server nats://127.0.0.1:5700 --timeout 5",
              STAND_IN, pick=r'"model_name":"[^"]*","status":"[^"]*"') for name in list(PORTS)[1:]),
        Row("… with capabilities, endpoint, topic, version, model_info", "infsvc req models.demo.health | jq -c '{endpoint, nats_topic, version, model_info}'"),
        *(Row(f"`curl :{PORTS[name]}/healthz`", f"curl -s localhost:{PORTS[name]}/healthz", STAND_IN) for name in ("gemma3-270m", "qwen3-4b", "gpt-oss-20b")),
        Row("`nats sub \"monitoring.inference.*\"`", "infsvc sub 'monitoring.inference.*' --raw --count 1 --timeout 30"),
        Row("`nats sub \"monitoring.inference.gemma3-270m\"`", "infsvc sub monitoring.inference.gemma3-270m --raw --count 1 --timeout 30", STAND_IN),
        Row("Reports every second under load, every 10 s idle",
            "infsvc sub monitoring.inference.qwen3-4b --raw --count 8 --timeout 40 | jq -c '[.timestamp[14:19], .pending_messages]' & sleep 1; " + FLOOD, STAND_IN),
        Row("Levels healthy, warning, critical",
            "infsvc sub monitoring.inference.qwen3-4b --raw --count 7 --timeout 40 | jq -c '[.pending_messages, .status]' & sleep 1; " + FLOOD, STAND_IN),
        Row("`nats sub \"models.*.heartbeat\"`", "infsvc sub 'models.*.heartbeat' --raw --count 1 --timeout 60", pick=r'"model_name":"[^"]*","status":"[^"]*"'),
        Row("`nats sub \"models.gemma3-270m.heartbeat\"`", "infsvc sub models.gemma3-270m.heartbeat --raw --count 1 --timeout 60", STAND_IN, pick=r'"model_name":"[^"]*","status":"[^"]*"'),
    ],
    "Audit log": [
        Row("Recent requests, by SQL", """sqlite3 data/logs/gemma3-270m.sqlite "SELECT req_id, worker_id, raw_input, formatted_input, dur_ms, status, datetime(ts, 'unixepoch') as time FROM requests ORDER BY ts DESC LIMIT 5" | head -1"""),
        Row("Requests by worker", """sqlite3 data/logs/gemma3-270m.sqlite "SELECT worker_id, COUNT(*) as request_count, AVG(dur_ms) as avg_latency FROM requests GROUP BY worker_id" """.strip()),
        Row("Trend", """sqlite3 data/logs/gemma3-270m.sqlite "SELECT datetime(ts, 'unixepoch') as time, dur_ms, tokens_out FROM requests ORDER BY ts DESC LIMIT 20" | head -2"""),
        Row("Events, by SQL", """sqlite3 data/logs/gemma3-270m.sqlite "SELECT datetime(ts, 'unixepoch') as time, level, code, msg FROM events ORDER BY ts DESC LIMIT 10" | head -2"""),
        Row("Event codes: startup, model.loading, model.loaded, services.init, server.ready, health.started, monitoring.started",
            """sqlite3 data/logs/gemma3-270m.sqlite "SELECT DISTINCT code FROM events" """.strip()),
    ],
    "Modes and formats": [
        Row("Raw over HTTP: `ms, text, tokens_in, tokens_out`", ask("gemma3-270m", '{"input": "Hello", "params": {"max_tokens": 20}, "raw": true}'), STAND_IN),
        Row("Raw over NATS",
            """echo '{"req_id": "test-raw-123", "input": "Complete: The capital of France is", "params": {"max_tokens": 5}, "raw": true}' | infsvc req inference.request.gemma3-270m --timeout 30""", STAND_IN),
        Row("`MODEL_FORMAT=template` and `prompt_template.json`", TEMPLATE, "the prompt as the model read it"),
        Row("`MODEL_FORMAT=harmony`, `HARMONY_REASONING_LEVEL`, `_EXTRACT_FINAL`, `_MODEL_IDENTITY`, `_KNOWLEDGE_CUTOFF`", HARMONY,
            "a tiny file of gpt-oss's architecture that says what is written for it: told apart by channel; then the prompt as it read it"),
    ],
    "Finding and choosing": [
        Row("Ask each model whether it is there",
            """for model in gemma3-270m qwen3-4b nomic-embed-v1.5; do echo "$model: $(echo '{}' | infsvc req models.$model.health --timeout 2 | jq -r .status)"; done""", STAND_IN),
        Row("Load of all models", "infsvc sub 'monitoring.inference.*' --raw --count 1 --timeout 30 | jq -c '[.model_name, .pending_messages, .status]'"),
        Row("`… models.gemma3-270m.health | jq .nats_topic`", "infsvc req models.gemma3-270m.health | jq -r .nats_topic", STAND_IN),
        Row("Fast: `:5770`", ask("gemma3-270m", '{"input": "Quick math: 2+2", "params": {"max_tokens": 10}}'), STAND_IN),
        Row("Balanced: `:5771`", ask("qwen3-4b", '{"input": "Explain photosynthesis", "params": {"max_tokens": 200}}'), STAND_IN),
        Row("Advanced: `:5772`", ask("gpt-oss-20b", '{"input": "Design a multi-agent system architecture", "params": {"max_tokens": 500}}'), STAND_IN),
        Row("For reasoning services: health, load, then a raw request",
            """infsvc req models.qwen3-4b.health >/dev/null && infsvc req inference.request.gpt-oss-20b '{"req_id": "reasoning-456", "input": "<|start|>system<|message|>You are an expert…<|end|><|start|>assistant", "params": {"max_tokens": 500}, "raw": true}'""", STAND_IN),
        Row("For agents: discover, choose by load, route",
            'python examples/agent.py --nats nats://127.0.0.1:5700 --url http://localhost:5780 "What is the weather in Oslo?"'),
    ],
    "Tests": [
        Row("`examples/test-grammar-crud.sh`", "examples/grammar_crud.sh | tail -1"),
        Row("`examples/test-inference-endpoints.sh`", "MODEL=gemma3-270m examples/inference_endpoints.sh | tail -1", STAND_IN),
        Row("`examples/test-parallel.sh`", "python examples/parallel.py --tokens 32 demo gemma3-270m | tail -5", STAND_IN),
        *(Row(f"`make test WORKER={name}`", f"make test WORKER={name}", STAND_IN) for name in ("gemma3-270m", "qwen3-4b", "gpt-oss-20b")),
        Row("`go test ./...`", "PYTEST_ADDOPTS=--collect-only make test | tail -1", "collected here; `make test` runs them"),
    ],
    "Configuration": [
        *(Row(f"`{key}`", f"grep -m1 '^| {key} |' docs/configuration.md") for key in (
            "NATS_URL", "SUBJECT", "WORKER_CONCURRENCY", "HTTP_ADDR", "MODEL_NAME", "MODEL_PATH", "MODEL_THREADS", "CTX_SIZE", "DB_PATH", "MODEL_FORMAT")),
        Row("A model of one's own: env file, model file, template, `make start`",
            "printf 'MODEL_PATH=data/models/demo/model.gguf\\nCTX_SIZE=512\\n' > envs/worker.mine.env; infsvc start mine; infsvc models list | grep mine",
            "in the running node; the Models screen's form writes such a file"),
    ],
    "Building and figures": [
        *(Row(f"`make build-llama-{kind}`", f"make -n build-llama-{kind} | grep -o 'CMAKE_ARGS=.*pip wheel'",
              "compiled here" if kind == "cpu" else NO_GPU) for kind in ("metal", "cuda", "cpu")),
        Row("Load times, latency, memory a model, speed-up of concurrent requests", "grep -m1 '^| demo |' docs/performance.md",
            "file, load, memory at rest and its estimate; all are measured anew by `python -m tests.benchmarks.load`: [performance](performance.md#several-models-and-many-requests)"),
        Row("JetStream queueing loses nothing", "python -m tests.torture.nats --seed 1 --requests 150 --kills 4 | tail -3",
            "nodes and broker are killed under load; `make torture` does it 30 times"),
        Row("Models do not block each other", "python examples/parallel.py --tokens 64 demo gemma3-270m | tail -2", STAND_IN),
    ],
    "Production": [
        Row("`docker build`", "docker build -f docker/Dockerfile -t infsvc .", NO_DOCKER, run=False),
        Row("`docker run --gpus all …`", "docker run --gpus all -p 127.0.0.1:5780:5780 -v infsvc:/data -e INFSVC_API_KEYS=key infsvc:cuda", NO_DOCKER, run=False),
        Row("Prometheus: `/metrics`", "curl -s localhost:5770/metrics", STAND_IN, pick=r"(?m)^infsvc_slots.*$"),
        Row("Health: `/healthz`", "curl -s localhost:5780/healthz | jq -c keys"),
        Row("Request tracing", "curl -s localhost:5780/v1/completions -H 'X-Trace-ID: my-trace' -d '{\"model\": \"demo\", \"input\": \"hi\"}' >/dev/null; sleep 0.2; sqlite3 data/logs/demo.sqlite \"SELECT trace_id, status FROM requests WHERE trace_id = 'my-trace'\""),
        Row("Structured logging", "head -1 data/logs/node.jsonl"),
        Row("Scaling: more instances, more `WORKER_CONCURRENCY`, NATS spreads the requests", TWO_NODES, "24 requests, two nodes, each with an audit log of its own"),
    ],
    "Subjects": [
        Row("`inference.request.<model>`", """infsvc req inference.request.demo '{"req_id": "test-123", "input": "What is machine learning?", "params": {"max_tokens": 100, "temperature": 0.7}}'"""),
        Row("`models.<model>.health`", "infsvc req models.demo.health", pick=r'"model_name":"[^"]*","status":"[^"]*"'),
        Row("`models.<model>.heartbeat` every 30 s", "infsvc sub models.demo.heartbeat --raw --count 1 --timeout 60", pick=r'"model_name":"[^"]*","status":"[^"]*"'),
        Row("`monitoring.inference.<model>`", "infsvc sub monitoring.inference.demo --raw --count 1 --timeout 30"),
        Row("`monitoring.aggregate` (was planned)", "infsvc sub monitoring.aggregate --raw --count 1 --timeout 30"),
        Row("`monitoring.alerts` (was planned)", "infsvc sub monitoring.alerts --raw --count 1 --timeout 30 & sleep 1; " + FLOOD, "a level that rises to critical; also a failed model, a dead letter"),
    ],
}  # fmt: skip

LAST = Row("`make stop`", "make stop")


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def code(text: str) -> str:
    """Text as inline code in a table's cell, whatever quotes it holds."""
    text = cell(text)
    fence = "``" if "`" in text else "`"
    return f"{fence}{' ' if fence == '``' else ''}{text}{' ' if fence == '``' else ''}{fence}"


def shown(output: str, pick: str) -> str:
    """What the page shows of an output: what was asked for, on one line, not too much of it."""
    output = re.sub(r"\x1b(\[[0-9;?>]*[A-Za-z]|\][^\a]*\a|[()][A-Z0-9])", "", output)
    if pick and (found := re.search(pick, output)):
        output = found[0]
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    text = " ⏎ ".join(lines)
    text = "".join(character if character.isprintable() else "·" for character in text)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"


HEAD = """# What the first README promised

This project replaces a service written in Go, whose README promised much. Here is each promise and each command of it,
the command that keeps it here, and what that really answered. The page is made by `python tools/promises.py`, which
starts a node and runs every row; outputs are shortened to a line (⏎ stands for a line's end).

Where a model would have to be fetched from the net, a stand-in has its name: the demo model's weights in place of
`gemma3-270m` and `qwen3-4b`, fetched from a hub on the same machine; a tiny file of gpt-oss's architecture that says what
is written for it in place of `gpt-oss-20b`; random weights of the same architecture in place of the two encoders. Doors,
ports, subjects and forms are then the real ones, and answers are those of the stand-in. `nats req` and `nats sub` of the
NATS tool do what `infsvc req` and `infsvc sub` do.
"""


def page(outputs: dict[str, str]) -> str:
    """The page, with each row's output by `section/number`."""
    text = [HEAD]
    for title, rows in SECTIONS.items():
        text += [f"## {title}\n", "| promised | here | answers | |", "|---|---|---|---|"]
        for number, row in enumerate(rows):
            answer = outputs.get(f"{title}/{number}", "")
            here = code(row.here.strip()) if row.here else "–"
            text.append(f"| {cell(row.promised)} | {here} | {code(answer) if answer else '–'} | {cell(row.note)} |")
        text.append("")
    return "\n".join(text)


SAYS = [
    "<|channel|>", "analysis", "<|message|>", "They ask", " who I am.", "<|end|>", "<|start|>", "assistant",
    "<|channel|>final<|message|>", "I am", " a stand-in", ": what I say", " is", " written", " for me.", "<|return|>",
]  # fmt: skip
"""What gpt-oss' stand-in answers to everything."""


def are_free(ports: Iterable[int]) -> bool:
    """Whether nobody listens on any of them."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True


def stand_ins(place: Place) -> None:
    """Puts the files there that are not fetched, and the settings of all stand-ins."""
    from tests.bert_files import random_bert, write_bert
    from tests.scripted_models import write_scripted_model

    bert = random_bert(n_embd=768, n_head=12, n_ff=256, n_ctx=2048)
    for name in list(PORTS)[1:]:
        key = f"INFSVC__{name.upper().replace('-', '_').replace('.', '_')}__"
        place.environ[f"{key}MODEL_THREADS"] = "1"
        file = place.home / f"data/models/{name}/model.gguf"
        if name.startswith("nomic"):
            file.parent.mkdir(parents=True)
            write_bert(file, bert, architecture="nomic-bert-moe" if name.endswith("moe") else "nomic-bert")
        elif name == "gpt-oss-20b":
            file.parent.mkdir(parents=True)
            write_scripted_model(file, SAYS, after="t")
            place.environ[f"{key}CTX_SIZE"] = "4096"
        else:
            place.environ[f"{key}CTX_SIZE"] = "1024"


def main(*wanted: str) -> None:
    """Runs all rows and writes the page; or only those whose promise holds a word that is `wanted`, and writes nothing."""
    from tests.commands import Place
    from tests.fake_hub import FakeHub

    demo = (ROOT / "data/models/demo/model.gguf").read_bytes()
    hub = FakeHub(demo, truncate_at=[1_500_000], anything=True, pause_s=0.02)
    with tempfile.TemporaryDirectory() as folder, hub:
        place = Place(Path(folder), models=PORTS, keep=are_free([5700, 5780, 8080, *PORTS.values()]))
        stand_ins(place)
        place.environ |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        outputs: dict[str, str] = {}
        failed: list[str] = []

        def run(title: str, number: int, row: Row) -> None:
            if wanted and not row.first and not any(word in row.promised for word in wanted):
                return
            done = place.run(row.here, timeout_s=180)
            told = shown(place.documented(done.stdout), row.pick).replace(folder, "…").replace(str(ROOT), ".")
            outputs[f"{title}/{number}"] = told
            print(f"{title} · {row.promised}: {told}", flush=True)
            if done.returncode:
                failed.append(f"{title} · {row.promised}: exit {done.returncode}\n{done.stdout}")

        rows = [(title, number, row) for title, rows in SECTIONS.items() for number, row in enumerate(rows) if row.run]
        with place.node(*(name for name in PORTS if name not in ("gemma3-270m", "qwen3-4b"))):
            for each in sorted(rows, key=lambda each: not each[2].first):
                run(*each)
            number = next(number for number, row in enumerate(SECTIONS["Make"]) if row.here == LAST.here)
            run("Make", number, LAST)
    if wanted and not failed:
        return
    if failed:
        sys.exit("\n".join(["these rows failed; the page was not written:", *failed]))
    TARGET.write_text(page(outputs))
    print(f"{TARGET} is written: {len(outputs)} rows were run")


if __name__ == "__main__":
    main(*sys.argv[1:])
