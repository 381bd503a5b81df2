"""Training in a process of its own, for a host that wants to go on without its memory.

What a GPU holds for a process is given back when that process ends, and not before. Used by the
PtychoPINN face; the other processes of a job (``peers``) end with their parent by the same means.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


def run_apart(module: str, request: Path) -> int:
    """Run ``python -m module request`` and wait for its end.

    The process is killed if this one is interrupted, and ends itself if this one dies.

    Args:
        module: whose ``main`` begins with :func:`end_with_parent`.
        request: a file that says what to do, and where to leave what came out.

    Returns:
        Its exit status.
    """
    # A pipe that nobody writes to: it closes when this process ends, however it ends.
    process = subprocess.Popen([sys.executable, "-m", module, str(request)], stdin=subprocess.PIPE)
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def end_with_parent() -> None:
    """Have this process end when the one that holds its standard input's other end does."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    os.read(0, 1)
    os._exit(1)
