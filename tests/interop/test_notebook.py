"""The notebook of the documents, in a real Jupyter kernel: the picture changes while it grows."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from nbclient import NotebookClient
from results_source import SCANS, Source, grown

from ptycho_stream.client import AsyncResultStream

NOTEBOOK = Path(__file__).parents[2] / "docs" / "live.ipynb"
pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(300),
    # Of jupyter_client, about event loops of its own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:jupyter_client"),
]


class Watched(NotebookClient):
    """Counts how often a picture in place was replaced."""

    replaced = 0

    def process_message(self, message, cell, cell_index):
        self.replaced += message["msg_type"] == "update_display_data"
        return super().process_message(message, cell, cell_index)


def outputs(notebook, source):
    (cell,) = [cell for cell in notebook.cells if source in cell.source]
    return cell.outputs


def test_the_notebook_runs_and_shows_a_picture_that_grows(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    programs = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "store it without outputs"
    client = Watched(notebook, timeout=200, kernel_name="python3")
    client.execute()
    assert client.replaced > 3
    (shown,) = outputs(notebook, "results.show()")
    assert "data:image/png;base64," in shown.data["text/html"]
    assert "(complete): 150 frames" in shown.data["text/html"]
    (plotted,) = outputs(notebook, "image.plot()")
    assert plotted.data["image/png"]
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in commands if str(tmp_path) in " ".join(words)]
    assert not list(tmp_path.glob("live-*"))


def test_the_asyncio_twin_shows_each_image_and_gives_back_the_last(capsys):
    async def show(endpoints):
        async with AsyncResultStream(*endpoints) as results:
            showing = asyncio.create_task(results.show(timeout_s=30))
            while f"{SCANS[0]} (running): 1 frames" not in capsys.readouterr().out:
                await asyncio.sleep(0.05)
            source.publish(grown(2, state="complete", final=True))
            return await showing

    with Source() as source:
        source.publish(grown(1))
        image = asyncio.run(show(source.endpoints))
    assert image.complete
    # Outside of a notebook IPython prints what it would show.
    assert str(image) in capsys.readouterr().out
