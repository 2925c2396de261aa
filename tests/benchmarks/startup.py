"""How long a start takes: from the command to the first frame, and to the demo model being ready.

`python -m tests.benchmarks.startup [--rounds 5]`. Medians, beside a bare Python that only imports Textual (the peer).
"""

from __future__ import annotations

import argparse
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.nodes import free_port, node_environ

ROOT = Path(__file__).resolve().parents[2]
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def start(home: Path) -> tuple[float, float]:
    """Seconds to the first frame and to `ready`, read off the screen itself."""
    environ = os.environ | node_environ(home, gateway=f":{free_port()}") | {"TERM": "xterm-256color"}
    environ |= {"INFSVC__DEMO__HTTP_ADDR": ":0", "COLUMNS": "120", "LINES": "40"}
    ours, theirs = pty.openpty()
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-c", "from infsvc.__main__ import main_tui; main_tui()", "demo"],
        cwd=ROOT,
        env=environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen, frame_s, ready_s = b"", 0.0, 0.0
    try:
        while not ready_s:
            seen += os.read(ours, 65536)
            text = _ESCAPES.sub(b"", seen)
            if not frame_s and b"the node starts" in text:
                frame_s = time.perf_counter() - begun
            if re.search(rb"\xe2\x97\x8f ready", text):
                ready_s = time.perf_counter() - begun
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            while os.read(ours, 65536):
                pass
        except OSError:
            pass
        child.wait(15)
        os.close(ours)
    return frame_s, ready_s


def bare() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import textual.app"], check=True)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    frames, readies, bares = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds + 1):
            frame_s, ready_s = start(Path(folder))
            frames.append(frame_s)
            readies.append(ready_s)
            bares.append(bare())
    # The first round is a warm-up: it compiles bytecode and proves the build once.
    for name, values in (("first frame", frames), ("demo ready", readies), ("import textual", bares)):
        kept = sorted(values[1:])
        print(f"{name:15} {statistics.median(kept):.2f} s ({kept[0]:.2f} to {kept[-1]:.2f}); first {values[0]:.2f} s")


if __name__ == "__main__":
    main()
