#!/usr/bin/env bash
# Installs the built wheel into an empty environment: it must put only `infsvc` into site-packages, and run from any folder.
set -euo pipefail
wheel=$(ls "$PWD"/dist/infsvc-*.whl)
dependencies=$("$PWD/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install -q --no-deps --no-index "$wheel"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
put=$(cd "$site" && ls -d -- * | grep -vE '^(pip|setuptools|pkg_resources|_distutils_hack|distutils-precedence\.pth|__pycache__)' | grep -v '^pip-\|^setuptools-' | sort | tr '\n' ' ')
case "$put" in
  "infsvc infsvc-"*".dist-info ") ;;
  *) echo "the wheel puts this into site-packages: $put" >&2; exit 1 ;;
esac
# The dependencies come from the development environment, minus the checkout that it points at.
mkdir -p "$scratch/elsewhere/engine" "$scratch/home"
echo 'raise ImportError("the wrong engine")' > "$scratch/elsewhere/engine/__init__.py"
cat > "$scratch/deps.py" <<'PY'
import os, sys
source, target = sys.argv[1:]
for name in os.listdir(source):
    if "infsvc" not in name and not os.path.exists(os.path.join(target, name)):
        os.symlink(os.path.join(source, name), os.path.join(target, name))
PY
"$scratch/venv/bin/python" "$scratch/deps.py" "$dependencies" "$site"
cd "$scratch/elsewhere"
for command in "infsvc --help" "infsvc serve --help" "infsvc-tui --help" "infsvc --version"; do
  "$scratch/venv/bin/${command%% *}" ${command#* } > /dev/null
done
export INFSVC_HOME="$scratch/home" INFSVC_GATEWAY=:0 INFSVC_NATS_URL=nats://127.0.0.1:1 INFSVC_EMBEDDED_NATS=off INFSVC__DEMO__HTTP_ADDR=:0
"$scratch/venv/bin/python" - <<'PY'
import json, subprocess, sys, urllib.request
child = subprocess.Popen([sys.executable, "-m", "infsvc", "serve", "demo"], stdout=subprocess.PIPE, text=True)
try:
    for line in child.stdout:
        event = json.loads(line)
        if event["code"] == "services.init":
            gateway = event["meta"]["gateway"]
        if event["code"] in ("model.loaded", "model.failed"):
            assert event["code"] == "model.loaded", event
            break
    body = json.dumps({"input": "hello", "params": {"max_tokens": 8, "temperature": 0}}).encode()
    request = urllib.request.Request(gateway + "/v1/completions", body, {"Content-Type": "application/json"})
    reply = json.load(urllib.request.urlopen(request, timeout=30))
    assert reply["tokens_out"] > 0, reply
finally:
    child.terminate()
assert child.wait(10) == 0, child.returncode
print("the wheel serves the demo model:", repr(reply["text"]))
PY
