"""The specification of the PtychoPINN face says what the code does: its tables are compared."""

import importlib
import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
from ptychopinn_scans import SIZE, make_scan, write_files

import ptycho_stream.ptychopinn as face
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn.bridge import RENAMED, canonical
from ptycho_stream.ptychopinn.bundle import Bundle, save
from ptycho_stream.ptychopinn.comparators import TOLERANCE
from ptycho_stream.ptychopinn.config import InferenceConfig, ModelConfig, TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.legacy import KEY_MAPPINGS, NOT_LEGACY, legacy_dict
from ptycho_stream.ptychopinn.npz_contract import load_npz
from ptycho_stream.ptychopinn.raw_data import GroupedData, RawData
from ptycho_stream.ptychopinn.runnable import ONLY, new_network

TESTS = Path(__file__).parent
SPEC = (TESTS.parent / "docs" / "specs" / "ptychopinn-backend.md").read_text()
KINDS = {"model": ModelConfig, "training": TrainingConfig, "inference": InferenceConfig}


def table(*columns: str) -> list[list[str]]:
    """The rows of the table with these columns; cells without backquotes at their ends."""
    head = "| " + " | ".join(columns)
    assert SPEC.count(head) == 1, head
    lines = SPEC[SPEC.index(head) :].splitlines()[2:]
    rows: list[list[str]] = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


SETTINGS = table("torch name", "canonical", "legacy key", "of", "default", "here")


def test_the_version_is_the_package_s():
    assert re.search(r"^Version: (\S+)$", SPEC, re.MULTILINE)[1] == face.SPEC_VERSION


# Settings


def test_every_setting_is_in_the_table_with_its_place_and_default():
    told = {
        (kind.strip(), names(row[1])[0]): default
        for row in SETTINGS
        for kind, default in zip(row[3].split(","), cycle(names(row[4])), strict=False)
    }
    real = {}
    for kind, config in KINDS.items():
        for each in fields(config):
            if each.name != "model":
                default = str(each.default) if isinstance(each.default, Path) else each.default
                assert default is not MISSING
                real[kind, each.name] = repr(default)
    assert told == real


def cycle(defaults):
    while True:
        yield from defaults


@pytest.mark.parametrize("row", SETTINGS, ids=[names(row[1])[0] for row in SETTINGS])
def test_torch_name_canonical_name_and_legacy_key_lead_to_each_other(row):
    (torch_name,), (name,), legacy = names(row[0]), names(row[1]), names(row[2])
    assert RENAMED.get(torch_name, torch_name) == name
    values = {"grid_size": (2, 2), "mode": "Supervised", "nll": True, "amp_activation": "silu"}
    assert list(canonical({torch_name: values.get(torch_name, 1)})) == [name]
    if legacy:
        assert legacy == [KEY_MAPPINGS.get(name, name)]
        config = KINDS[row[3].split(",")[0]]()
        assert legacy[0] in legacy_dict(config)
    else:
        assert row[2] == "—" and name in NOT_LEGACY


def test_torch_names_that_differ_are_all_in_the_table():
    told = {names(row[0])[0]: names(row[1])[0] for row in SETTINGS}
    assert {torch: name for torch, name in told.items() if torch != name} == RENAMED


def test_what_runs_with_one_value_only_is_marked():
    told = {}
    for row in SETTINGS:
        if found := re.match(r"only `([^`]+)`", row[5]):
            told[names(row[1])[0]] = found[1]
    assert told == {name: repr(value) for name, (value, _) in ONLY.items()}


def test_the_execution_s_settings_are_in_the_table():
    told = {names(row[0])[0]: names(row[1])[0] for row in table("setting", "default", "")}
    assert told == {each.name: repr(each.default) for each in fields(ExecutionConfig)}


# Entry points


SURFACE = table("name", "module", "arguments")


def test_the_package_s_names_are_the_modules_objects():
    """The risk of two surfaces is that they drift apart: this one has no code of its own."""
    told = {names(row[0])[0]: names(row[1])[0] for row in SURFACE}
    assert set(told) | {"SPEC_VERSION"} == set(face.__all__)
    for name, module in told.items():
        home = importlib.import_module(f"ptycho_stream.ptychopinn.{module}")
        assert getattr(face, name) is getattr(home, name)
        if inspect.isclass(getattr(face, name)) or inspect.isfunction(getattr(face, name)):
            assert getattr(face, name).__module__ == home.__name__
    own = inspect.getsource(face)
    assert "def " not in own and "class " not in own


@pytest.mark.parametrize("row", SURFACE, ids=[names(row[0])[0] for row in SURFACE])
def test_entry_points_take_the_arguments_that_are_told(row):
    thing = getattr(face, names(row[0])[0])
    if names(row[2])[:1] and callable(thing):
        told = names(row[2])[0].split(", ")
        assert list(inspect.signature(thing).parameters) == told
    for maker in names(row[2])[1:]:
        assert callable(getattr(thing, maker))


def test_what_is_not_among_them_is_there_too():
    from ptycho_stream.ptychopinn.fit import fit

    told = re.search(r"`fit\.fit\(([^)]*)\)`", SPEC)[1]
    assert list(inspect.signature(fit).parameters) == told.split(", ")
    told = re.search(r"`generate_grouped_data\(([^)]*)\)`", SPEC)[1].replace(" *,", "")
    found = list(inspect.signature(RawData.generate_grouped_data).parameters)
    assert found == ["self", *told.split(", ")]
    told = re.search(r"`PtychoModel\.diffraction_to_obj\(([^)]*)\)`", SPEC)[1]
    for function in (face.PtychoModel.diffraction_to_obj, face.PtychoModel.autoencoder):
        told_names = [each.split("=")[0] for each in told.split(", ")]
        assert list(inspect.signature(function).parameters) == ["self", *told_names]
    default = inspect.signature(face.reassemble_position).parameters["M"].default
    assert f"reassemble_position(obj, global_offsets, M={default})" in SPEC


# Data


def test_the_grouped_data_are_as_told(tmp_path):
    write_files(tmp_path, make_scan(20))
    raw = RawData.from_file(tmp_path / "train_data.npz")
    grouped = raw.generate_grouped_data(SIZE, 6, 5, gridsize=2, seed=0)
    rows = table("name", "shape", "dtype")
    assert [names(row[0])[0] for row in rows] == list(GroupedData.__annotations__) == list(grouped)
    height, width = raw.objectGuess.shape
    sizes = {"B": 5, "N": SIZE, "C": 4, "H": height, "W": width}
    for row in rows:
        shape = tuple(sizes.get(each) or int(each) for each in row[1].strip("()").split(", "))
        array = grouped[names(row[0])[0]]
        assert array.shape == shape and array.dtype == np.dtype(row[2]), row


def test_the_file_s_keys_are_as_told(tmp_path):
    write_files(tmp_path, make_scan(20))
    told = {name for row in table("key", "shape", "") for name in names(row[0])}
    with np.load(tmp_path / "train_data.npz") as held:
        assert set(held.files) <= told
        arrays = {name: held[name] for name in held.files}
    assert told - set(arrays) == {"diffraction", "Y", "bad_pixels", "measurement_domain"}
    arrays["Y"] = np.ones((20, SIZE, SIZE), complex)
    arrays["bad_pixels"] = np.eye(SIZE, dtype=bool)
    arrays["diffraction"] = arrays.pop("diff3d")
    arrays["measurement_domain"] = np.array("amplitude")
    np.savez(tmp_path / "all.npz", **arrays)
    found = load_npz(tmp_path / "all.npz")
    assert found.Y is not None and found.bad_pixels is not None


def test_the_archive_s_members_are_as_told(tmp_path):
    import zipfile

    model = ModelConfig(N=32, n_filters_scale=1)
    probe = Probe(np.ones((1, 32, 32), np.complex64))
    path = save(Bundle(new_network(model), TrainingConfig(model=model), probe, 1.0), tmp_path)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [names(row[0])[0] for row in table("member", "")]


def test_the_tolerance_is_as_told():
    assert f"at most {TOLERANCE:g} of" in SPEC


# Traps


def test_each_trap_has_its_test():
    rows = table("trap", "test")
    there = set()
    for path in TESTS.glob("test_ptychopinn_*.py"):
        there |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    told = {name for row in rows for name in names(row[1])}
    assert len(rows) == 16 and told <= there, told - there
