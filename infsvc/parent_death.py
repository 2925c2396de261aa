"""A child process that does not outlive the one that started it, also when that one is killed outright.

A child in Python binds itself (`bind`). For any other command this file is a script, `python -I -S parent_death.py
PARENT_PID COMMAND …`, run by a bare interpreter that sees nothing of the project. On Linux the kernel does the work
(`PR_SET_PDEATHSIG`) and this process becomes the command. The signal is tied to the parent's *thread*, so the parent
starts its children from the thread that its loop lives on. Other systems keep this process as a watcher that holds the
read end of a pipe: when the parent is gone the pipe ends, and the command is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


def bind(parent: int) -> None:
    """Linux: has the kernel kill this process when `parent`, which started it, is gone; exits where it is already.
    Holds across an exec; elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    # A parent that died before the call above sends no signal any more.
    if os.getppid() != parent:
        sys.exit("the parent is gone")


def become(parent: int, command: list[str]) -> NoReturn:
    """Linux: turns this process into the command, bound to `parent`."""
    bind(parent)
    os.execv(command[0], command)


def watch(command: list[str]) -> int:
    """Other systems: runs the command until it ends or standard input does; its exit status."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def kill_at_end() -> None:
        while os.read(0, 4096):
            pass
        child.kill()

    # The parent signals the whole process group; this process stays until the command has ended.
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=kill_at_end, name="parent-watch", daemon=True).start()
    return child.wait()


def main(arguments: list[str]) -> int:
    parent, command = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        become(parent, command)
    return watch(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
