#!/usr/bin/env bash
# Every way to ask a model over HTTP. Needs a running node (`make run`); INFSVC_URL and MODEL name another.
set -euo pipefail
url=${INFSVC_URL:-http://127.0.0.1:5780} model=${MODEL:-demo}

ask() { # METHOD PATH [BODY]
  echo "--- $1 $2"
  curl -sS --fail-with-body -X "$1" "$url$2" -H "Content-Type: application/json" ${3:+-d "$3"}
  echo
}

ask GET /healthz
ask GET /v1/models
ask POST /v1/completions '{"model": "'"$model"'", "input": "What is backpressure?", "params": {"temperature": 0}}'
ask POST /v1/completions '{"model": "'"$model"'", "input": "hello", "stream": true, "params": {"max_tokens": 8}}'
ask POST /v1/completions '{"model": "'"$model"'", "input": "Hello", "raw": true, "params": {"max_tokens": 8}}'
ask POST /v1/completions '{"model": "'"$model"'", "prompt": "Hello", "max_tokens": 8}'
ask POST /v1/chat/completions '{"model": "'"$model"'", "messages": [{"role": "user", "content": "hello"}], "temperature": 0}'
ask GET "/logs?model=$model&limit=2"

echo "--- an error says what is wrong"
curl -sS -X POST "$url/v1/completions" -d '{"model": "'"$model"'", "input": "hi", "params": {"max_tokens": 0}}'
echo
echo "all endpoints answered"
