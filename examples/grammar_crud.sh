#!/usr/bin/env bash
# A grammar's life: create, list, show, use by name, replace, delete. Needs a running node (`make run`).
set -euo pipefail
url=${INFSVC_URL:-http://127.0.0.1:5780} model=${MODEL:-demo} name=example-colour

call() { # METHOD PATH [BODY]
  echo "--- $1 $2"
  curl -sS --fail-with-body -X "$1" "$url$2" -H "Content-Type: application/json" ${3:+-d "$3"}
  echo
}

call POST /grammars '{"name": "'$name'", "description": "one of three colours", "content": "root ::= \"red\" | \"green\" | \"blue\""}'
trap 'curl -sS -o /dev/null -X DELETE "$url/grammars/'$name'"' EXIT
call GET /grammars
call GET /grammars/$name
call POST /v1/completions '{"model": "'"$model"'", "input": "Name a colour", "params": {"grammar": "'$name'", "temperature": 0}}'
call PUT /grammars/$name '{"description": "two colours", "content": "root ::= \"black\" | \"white\""}'
call POST /v1/completions '{"model": "'"$model"'", "input": "Name a colour", "params": {"grammar": "'$name'", "temperature": 0}}'

echo "--- a broken one is refused, with the place"
curl -sS -X POST "$url/grammars" -d '{"name": "example-broken", "description": "", "content": "root ::= object\nobject ::= \"{\" ws \"}\" ..."}'
echo
echo "the grammar was created, used, replaced and is deleted now"
