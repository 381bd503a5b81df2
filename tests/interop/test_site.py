"""The documents as a site: every link leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ptycho_stream.cli import COMMANDS
from ptycho_stream.settings import Settings

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.interop, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads by itself to show a page."""

    def __init__(self, text):
        super().__init__()
        self.places = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag in ("img", "script", "iframe", "source", "video"):
            self.places.append(found.get("src") or "")
        elif tag == "link" and found.get("rel") not in ("canonical", "next", "prev"):
            self.places.append(found.get("href") or "")


def test_pages_load_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        places = Loaded(page.read_text()).places
        assert len(places) > 2, page
        assert not [place for place in places if "//" in place], page


def test_the_reference_is_written_from_the_code(site):
    settings = (site / "reference" / "settings.html").read_text()
    for table in Settings.model_fields:
        assert f"[{table}]" in settings or f"<code>{table}</code>" in settings, table
    commands = (site / "reference" / "cli.html").read_text()
    for command in COMMANDS:
        assert f"<code>ptycho-stream {command}</code>" in commands, command
    python = (site / "reference" / "python.html").read_text()
    assert "wait_complete" in python and "Draw phase" in python
    assert "make demo" in (site / "index.html").read_text()
