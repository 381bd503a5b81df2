"""Logs: for people on a terminal or in a file, with levels where systemd's journal reads."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from ptycho_streamd.log_format import JournalFormatter

PROGRAM = "import sys; from ptycho_streamd.supervisor import main; sys.exit(main())"


def said(folder: Path, *, journal: bool) -> str:
    """What the daemon logs of a wrong file, its stderr being the journal's stream or not."""
    config = folder / "daemon.toml"
    config.write_text("[data]\ndirectory = 'd'\n[nonsense]\na = 1\n")
    reader, writer = os.pipe()
    known = os.fstat(writer)
    stream = f"{known.st_dev}:{known.st_ino}" if journal else "1:2"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--config", str(config)],
        stderr=writer,
        env={**os.environ, "JOURNAL_STREAM": stream},
        timeout=50,
        check=False,
    )
    os.close(writer)
    with os.fdopen(reader) as text:
        assert done.returncode == 78
        return text.read()


def test_each_line_for_the_journal_begins_with_its_level(tmp_path):
    lines = said(tmp_path, journal=True).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("<3>ptycho-streamd ptycho_streamd.supervisor: ")
    assert all(line.startswith("<3>") for line in lines)


def test_a_file_or_a_terminal_gets_time_and_level(tmp_path):
    first = said(tmp_path, journal=False).splitlines()[0]
    assert first[:2] == "20" and " ERROR ptycho-streamd ptycho_streamd.supervisor: " in first


def test_tracebacks_keep_their_level():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("a.b", logging.WARNING, "", 1, "m", None, sys.exc_info())
    lines = JournalFormatter("ingest %(name)s: %(message)s").format(record).splitlines()
    assert lines[0] == "<4>ingest a.b: m" and len(lines) > 4
    assert all(line.startswith("<4>") for line in lines)
