"""The documents say what is: commands parse, links lead somewhere, imports exist."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main

from ptycho_stream.cli import build_app
from ptycho_stream.settings import Settings, load_settings
from ptycho_streamd.settings_file import write_settings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
COMMAND = re.compile(r"^(?: {4,}|\$ )(ptycho-stream .*?)[\s&]*(?:#.*)?$", re.MULTILINE)
EXAMPLE = re.compile(r"^```toml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^ *from (ptycho_stream[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_lead_to_files(document):
    for target in LINK.findall(document.read_text()):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def text_of(document: Path) -> str:
    """A document, or what the comments of a configuration say."""
    text = document.read_text()
    return re.sub("^#", "", text, flags=re.MULTILINE) if document.suffix == ".toml" else text


def commands() -> list[tuple[str, str]]:
    return [
        (document.name, found)
        for document in [*DOCUMENTS, *CONFIGS]
        for found in COMMAND.findall(text_of(document))
        if not re.search(r"[A-Z]{2,} \||…|\.\.\.|\|", found)
    ]


@pytest.mark.parametrize(("document", "text"), commands())
def test_commands_parse(document, text):
    """Every option of every command line is one that the program knows."""
    arguments = shlex.split(text)[1:]
    command = typer.main.get_command(build_app(arguments))
    context = command.make_context("ptycho-stream", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        assert command is not None
        context = command.make_context(name, rest, parent=context)


def test_there_are_commands_to_check():
    assert len(commands()) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_python_imports_exist(document):
    for module, imported in IMPORT.findall(document.read_text()):
        held = importlib.import_module(module)
        for name in map(str.strip, imported.split(",")):
            assert hasattr(held, name) or importlib.util.find_spec(f"{module}.{name}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_examples_of_settings_are_sound(document):
    for example in EXAMPLE.findall(document.read_text()):
        Settings.model_validate({"probe": {"path": "probe.npz"}, **tomllib.loads(example)})


@pytest.mark.parametrize("config", CONFIGS, ids=names)
def test_configurations_are_sound_and_reach_the_stages_as_they_are(config, tmp_path):
    settings = load_settings(config)
    write_settings(settings, tmp_path / "settings.toml")
    assert load_settings(tmp_path / "settings.toml") == settings
