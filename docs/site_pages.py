"""Pages of the site that are not files of this folder, for mkdocs (a hook in ``mkdocs.yml``).

The README is the front page; settings and command line are written from the code.  Links between
documents are those that work in the repository: they are turned into the site's here.  Entries of
the navigation are patterns, and mkdocs says which page none of them takes up.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import typer
import typer.main
from mkdocs.structure.files import File
from typer.cli import get_docs_for_click

from ptycho_stream.cli import build_app
from ptycho_stream.settings import Settings

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Of the repository's root -> of the site.
FRONT = {"README.md": "index.md", "SECURITY.md": "threat-model.md"}  # security.md is there, too
FRONT |= {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")

Schema = dict[str, Any]


def on_config(config: Any) -> None:
    """Have the patterns of the navigation stand for the pages that there are."""
    written = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    pages = sorted([*written, *FRONT.values(), *GENERATED])
    config.nav = list(_expanded(config.nav, pages))


def on_files(files: Any, config: Any) -> None:
    """Add the pages and files that do not lie in the folder of the documents."""
    for source, page in FRONT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for page, write in GENERATED.items():
        files.append(File.generated(config, page, content=write()))
    for name in ["LICENSE", *_configs()]:
        files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links that work in the repository into the site's."""
    name = page.file.src_uri
    if name in GENERATED:
        return markdown
    folder = ROOT if name in FRONT.values() else (DOCS / name).parent

    def in_site(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target.is_dir():  # stands for its first page
            target = min(target.glob("*.md"), default=DOCS / CONFIGURATIONS)
        if not target.is_relative_to(ROOT):
            return link[0]
        place = target.relative_to(ROOT).as_posix()
        place = FRONT.get(place, place.removeprefix("docs/"))
        return os.path.relpath(place, Path(name).parent)

    return LINK.sub(in_site, markdown)


def _expanded(entries: list[Any], pages: list[str]) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, str):
            yield from (page for page in pages if fnmatch(page, entry))
            continue
        ((title, inside),) = entry.items()
        if isinstance(inside, list):
            yield {title: list(_expanded(inside, pages))}
        elif "*" in inside:
            yield {title: list(_expanded([inside], pages))}
        else:
            yield entry


def _configs() -> list[str]:
    paths = (ROOT / "configs").rglob("*")
    return sorted(path.relative_to(ROOT).as_posix() for path in paths if path.is_file())


def configurations() -> str:
    """Every file of ``configs/``."""
    links = "\n".join(f"- [{name}](../{name})" for name in _configs())
    return f"# Configurations\n\nFiles that come with the program, to start from.\n\n{links}\n"


def command_line() -> str:
    """Every command with its options, as its ``--help`` has it."""
    program = typer.main.get_command(build_app([]))
    context = typer.Context(program, info_name="ptycho-stream")
    text = get_docs_for_click(obj=program, ctx=context, name="ptycho-stream")
    return text.replace("# `ptycho-stream`", "# Command line", 1)


def settings() -> str:
    """Every key of the configuration file."""
    schema = Settings.model_json_schema()
    lines = [
        "# Settings",
        "",
        "All keys of the daemon's TOML file, which `ptycho-stream config check FILE` judges.",
        "Other keys are errors. Relative paths count from the file's folder.",
    ]
    lines += _Tables(schema["$defs"]).of("", schema)
    return "\n".join(lines) + "\n"


class _Tables:
    """Tables of the file as tables of the page; one that occurs twice is written once."""

    def __init__(self, sections: dict[str, Schema]) -> None:
        self._sections = sections
        self._written: dict[str, str] = {}

    def of(self, name: str, section: Schema) -> list[str]:
        """A table of the file (``[name]``), and those inside it."""
        lines = ["", f"## `{name}`" if name else "## Before the first table", ""]
        lines += [section.get("description", "").split("\n\n")[0], ""] if name else []
        rows: list[str] = []
        inner: list[str] = []
        for key, value in section["properties"].items():
            kinds = self._kinds(value)
            path = f"{name.strip('[]')}.{key}".strip(".")
            heading = f"[[{path}]]" if value.get("type") == "array" else f"[{path}]"
            for kind in kinds:
                if kind in self._written:
                    rows.append(f"| `{key}` | a table | | as `{self._written[kind]}` |")
                else:
                    self._written[kind] = heading
                    inner += self.of(heading, self._sections[kind])
            if not kinds:
                rows.append(_row(key, value, key in section.get("required", ())))
        if rows:
            lines += ["| key | value | default | meaning |", "|---|---|---|---|", *rows]
        return lines + inner

    def _kinds(self, value: Schema) -> list[str]:
        """Which tables may be a key's value: more than one where a key in them decides."""
        if "$ref" in value:
            return [value["$ref"].rsplit("/", 1)[-1]]
        inside = [*value.get("anyOf", ()), *value.get("oneOf", ())]
        inside += [value["items"]] if "items" in value else []
        return [kind for choice in inside for kind in self._kinds(choice)]


def _row(key: str, value: Schema, required: bool) -> str:
    default = "required" if required else _written(value.get("default"))
    cells = (f"`{key}`", _values(value), default, value.get("description", ""))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _written(value: Any) -> str:
    return "" if value in (None, {}, [], ()) else f"`{json.dumps(value, ensure_ascii=False)}`"


_BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
}


def _values(value: Schema) -> str:
    """Which values a key takes, in words."""
    if "anyOf" in value:
        choices = [_values(choice) for choice in value["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(choices))
    if "enum" in value or "const" in value:
        return ", ".join(
            f"`{json.dumps(word)}`" for word in value.get("enum", [value.get("const")])
        )
    if "prefixItems" in value:
        return "[" + ", ".join(_values(item) for item in value["prefixItems"]) + "]"
    if value.get("type") == "array":
        return "list of: " + _values(value["items"])
    kind = {"string": "text", "object": "table"}.get(value["type"], value["type"])
    kind = "path" if value.get("format") == "path" else kind
    bounds = [text.format(value[key]) for key, text in _BOUNDS.items() if key in value]
    return ", ".join([kind, *bounds])


CONFIGURATIONS = "reference/configurations.md"
GENERATED = {
    "reference/settings.md": settings,
    "reference/cli.md": command_line,
    CONFIGURATIONS: configurations,
}
