"""The pinned versions: all that pyproject.toml names is there, and `make` installs with them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    return {canonicalize_name(name): version for name, version in (x.split("==") for x in lines)}


def test_every_dependency_is_pinned_to_a_version_that_is_let_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    versions = pinned()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        wanted = Requirement(text)
        if canonicalize_name(wanted.name) == "ptycho-stream":
            continue
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} is not pinned: run make constraints"
        assert wanted.specifier.contains(version), f"{wanted} and {version}: run make constraints"


def test_make_installs_nothing_without_the_constraints():
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(
        r"^\t\$\(BIN\)/.*\binstall\b.*$|^\t\$\(BIN\)/\$\(PIP_INSTALL\).*$", makefile, re.MULTILINE
    )
    assert len(installs) >= 3
    assert all("$(PIP_INSTALL)" in line for line in installs)
    assert "PIP_INSTALL := python -m pip install --quiet --constraint constraints.txt" in makefile
