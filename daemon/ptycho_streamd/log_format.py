"""How the daemon's processes log: for people on a terminal, with levels where journald listens.

Every process calls :func:`configure_logging` first of all.  Under systemd each line begins with its
priority in angle brackets (sd-daemon(3)), so that ``journalctl -p warning`` finds what matters; the
time is the journal's own there.
"""

from __future__ import annotations

import logging
import os
import sys

PRIORITIES = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


class JournalFormatter(logging.Formatter):
    """Lines as journald takes them: a level before each, also before those of a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One record; it may be several lines."""
        prefix = f"<{PRIORITIES.get(record.levelname, 6)}>"
        return "\n".join(prefix + line for line in super().format(record).splitlines())


def configure_logging(level: str, process: str) -> None:
    """Log to stderr from ``level`` on, as what reads it there wants it."""
    handler = logging.StreamHandler(sys.stderr)
    text = f"{process} %(name)s: %(message)s"
    if _is_journal(os.environ.get("JOURNAL_STREAM", "")):
        handler.setFormatter(JournalFormatter(text))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {text}"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _is_journal(stream: str) -> bool:
    """Whether stderr is what systemd connected to the journal, device and inode, and not a file."""
    try:
        known = os.fstat(sys.stderr.fileno())
    except OSError:
        return False
    return stream == f"{known.st_dev}:{known.st_ino}"
