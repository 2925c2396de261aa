"""What native code prints goes to a file; the terminal stays Python's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.native_log import NativeLog

CHILD = """
import os, sys
from pathlib import Path
from engine.native_log import redirect
redirect(Path(sys.argv[1]))
print("for people")
print("for people too", file=sys.stderr)
os.write(1, b"native out\\n")
os.write(2, b"native err\\n")
os.abort()
"""


def test_the_last_words_before_an_abort_are_kept(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "native.log"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(log)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert child.returncode < 0
    assert (child.stdout, child.stderr.splitlines()[0]) == ("for people\n", "for people too")
    assert log.read_text().startswith("native out\nnative err\n")


def test_new_whole_lines_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "native.log"
    path.write_bytes(b"old\n")
    log = NativeLog(path)
    assert log.read() == []
    with path.open("ab") as stream:
        stream.write(b"load failed: no file\nplain\n......\nhalf")
        stream.flush()
        assert [text for _, text in log.read()] == ["load failed: no file", "plain"]
        stream.write(b" a line \xff\n")
    assert log.read() == [("info", "half a line \ufffd")]
    assert log.read() == []


def test_a_step_that_a_cancel_has_ended_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "native.log"
    log = NativeLog(path)
    path.write_text(
        "graph_compute: ggml_backend_sched_graph_compute_async failed with error 1\n"
        "process_ubatch: failed to compute graph, compute status: 1\n"
        "llama_decode: failed to decode, ret = 2\n"
        "llama_decode: failed to decode, ret = -3\n"
        "process_ubatch: failed to compute graph, compute status: -1\n"
    )
    assert [level for level, _ in log.read()] == ["debug", "debug", "debug", "error", "error"]


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert NativeLog(tmp_path / "native.log").read() == []


def test_levels_are_told_by_the_words(tmp_path: Path) -> None:
    path = tmp_path / "native.log"
    log = NativeLog(path)
    path.write_text("error loading\nload failed: error\nwarning: x\nllama_model_loader: y\n")
    assert [level for level, _ in log.read()] == ["warning", "error", "warning", "info"]
