"""The model registry: shipped weights, strict loads, atomic saves."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from ptycho_stream.errors import ModelError
from ptycho_stream.models.active import ACTIVE_FILE, DEFAULT_MODEL, MAX_HISTORY, ActiveModels
from ptycho_stream.models.folders import MANIFEST_FILE, WEIGHTS_FILE
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.unrolled import UnrolledNetwork, UnrolledSettings

_SMALL = UnrolledSettings(stages=1, steps=1, channels=(4, 4, 4), memory=2)


def _manifest(name="mine", **changes):
    values = {"name": name, "architecture": "unrolled", "settings": _SMALL.to_json()} | changes
    return Manifest(**values)


@pytest.fixture
def registry(tmp_path):
    registry = ModelRegistry(tmp_path / "models")
    registry.save(UnrolledNetwork(_SMALL), _manifest())
    return registry


def test_the_package_ships_a_default_model():
    network, manifest = ModelRegistry().load("default")
    assert manifest.name == DEFAULT_MODEL
    assert isinstance(network, UnrolledNetwork)
    assert not network.training
    assert DEFAULT_MODEL in [m.name for m in ModelRegistry().list()]


def test_the_shipped_manifest_says_how_the_weights_were_made():
    manifest = ModelRegistry().load()[1]
    assert manifest.seed is not None
    assert {"data", "steps", "seconds"} <= manifest.training.keys()
    assert manifest.metrics["val_nrmse"] > 0


def test_what_was_saved_is_loaded(tmp_path):
    registry = ModelRegistry(tmp_path / "models")
    network = UnrolledNetwork(_SMALL)
    torch.nn.init.normal_(network.correctors[0].leave.weight)
    written = registry.save(network, _manifest(seed=7, parent="unrolled-v2"))
    loaded, manifest = registry.load("mine")
    assert manifest == written
    assert manifest.created
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])


def test_a_folder_adds_models_and_hides_shipped_ones(registry):
    assert {m.name for m in registry.list()} >= {"mine", DEFAULT_MODEL}
    registry.save(UnrolledNetwork(_SMALL), _manifest(DEFAULT_MODEL))
    assert registry.load("default")[1].settings == _SMALL.to_json()


def test_models_are_never_overwritten(registry):
    with pytest.raises(ModelError, match="exists"):
        registry.save(UnrolledNetwork(_SMALL), _manifest())


def test_a_failed_save_leaves_nothing(registry, tmp_path):
    other = UnrolledNetwork(UnrolledSettings(stages=2))
    with pytest.raises(ModelError, match="do not fit"):
        registry.save(other, _manifest("wrong"))
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["mine"]


def test_a_registry_without_a_folder_cannot_save():
    with pytest.raises(ModelError, match="folder"):
        ModelRegistry().save(UnrolledNetwork(_SMALL), _manifest())


@pytest.mark.parametrize("name", ["../up", "", ".hidden", "a/b", "x" * 65])
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(ModelError, match="name"):
        _manifest(name)


def test_an_unknown_model_is_answered_with_those_that_exist(registry):
    with pytest.raises(ModelError, match="mine"):
        registry.load("yours")


def test_truncated_weights_are_refused(registry):
    weights = registry.root / "mine" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="sha256"):
        registry.load("mine")


def test_missing_weights_are_refused(registry):
    (registry.root / "mine" / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelError, match=WEIGHTS_FILE):
        registry.load("mine")


def _edit(registry, **changes):
    path = registry.root / "mine" / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_unknown_architecture_is_named(registry):
    _edit(registry, architecture="transformer")
    with pytest.raises(ModelError, match="transformer"):
        registry.load("mine")


def test_weights_of_another_network_are_refused(registry):
    _edit(registry, settings=UnrolledSettings(stages=2, memory=2).to_json())
    with pytest.raises(ModelError, match=r"missing.*correctors\.1"):
        registry.load("mine")


def test_a_file_that_is_no_safetensors_is_refused(registry):
    import hashlib

    content = b"not tensors"
    (registry.root / "mine" / WEIGHTS_FILE).write_bytes(content)
    _edit(registry, sha256=hashlib.sha256(content).hexdigest())
    with pytest.raises(ModelError, match="safetensors"):
        registry.load("mine")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"name": 3}'])
def test_a_broken_manifest_is_refused(registry, text):
    (registry.root / "mine" / MANIFEST_FILE).write_text(text)
    with pytest.raises(ModelError, match=MANIFEST_FILE):
        registry.load("mine")


def test_unfinished_saves_are_not_listed(registry):
    shutil.copytree(registry.root / "mine", registry.root / ".other-draft")
    assert [m.name for m in registry.list() if m.name != DEFAULT_MODEL] == ["mine"]


def test_a_stray_folder_does_not_hide_the_others(registry, caplog):
    (registry.root / "notes").mkdir()
    shutil.copytree(registry.root / "mine", registry.root / "broken")
    (registry.root / "broken" / MANIFEST_FILE).write_text("{")
    assert "mine" in [m.name for m in registry.list()]
    assert "notes" in caplog.text and "broken" in caplog.text
    with pytest.raises(ModelError, match=MANIFEST_FILE):
        registry.load("notes")


def test_a_model_that_was_renamed_by_hand_is_refused(registry):
    (registry.root / "mine").rename(registry.root / "yours")
    with pytest.raises(ModelError, match=r"'mine'.*yours"):
        registry.load("yours")


@pytest.mark.parametrize("name", ["../up", "", "mine"])
def test_a_name_can_be_checked_before_there_is_a_model(registry, name):
    with pytest.raises(ModelError):
        registry.check_new(name)
    registry.check_new("other")


def test_a_registry_that_is_a_file_is_refused_before_there_is_a_model(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file"):
        ModelRegistry(tmp_path / "file").check_new("mine")


def test_another_model_is_taken_into_use_and_given_up_again(registry):
    assert registry.active() == DEFAULT_MODEL
    registry.use("mine")
    assert registry.active() == "mine"
    assert registry.load("default")[1].name == "mine"
    registry.use(DEFAULT_MODEL)
    registry.use(DEFAULT_MODEL)
    assert registry.rollback() == "mine"
    assert registry.rollback() == DEFAULT_MODEL
    with pytest.raises(ModelError, match="no model to go back to"):
        registry.rollback()
    assert registry.active() == DEFAULT_MODEL


def test_no_model_can_be_named_default_and_so_come_into_use_unasked(registry):
    with pytest.raises(ModelError, match="stands for the model in use"):
        registry.check_new("default")
    (registry.root / "default").mkdir()
    assert registry.active() == DEFAULT_MODEL


def test_a_model_that_does_not_load_is_not_taken_into_use(registry):
    (registry.root / "mine" / WEIGHTS_FILE).write_bytes(b"")
    for name, said in (("mine", "truncated"), ("yours", "no model"), ("default", "no model")):
        with pytest.raises(ModelError, match=said):
            registry.use(name)
    assert registry.active() == DEFAULT_MODEL
    with pytest.raises(ModelError, match="folder"):
        ModelRegistry().use(DEFAULT_MODEL)


def test_a_former_model_that_does_not_load_is_not_gone_back_to(registry):
    registry.save(UnrolledNetwork(_SMALL), _manifest("next"))
    registry.use("mine")
    registry.use("next")
    (registry.root / "mine" / WEIGHTS_FILE).unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        registry.rollback()
    assert registry.active() == "next"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"history": "mine"}', '{"history": [3]}'])
def test_a_damaged_note_of_the_model_in_use_is_named(registry, text):
    (registry.root / ACTIVE_FILE).write_text(text)
    for action in (registry.load, registry.rollback, lambda: registry.use("mine")):
        with pytest.raises(ModelError, match=ACTIVE_FILE):
            action()
    assert registry.load("mine")[1].name == "mine"


def test_the_note_of_the_models_in_use_does_not_grow_for_ever(registry):
    note = ActiveModels(registry.root)
    for turn in range(MAX_HISTORY + 5):
        note.push(f"model-{turn}")
    assert len(note.history()) == MAX_HISTORY
    note.pop("model-0")
    assert note.history()[-1] == f"model-{MAX_HISTORY + 4}"


def test_several_programs_may_change_the_model_in_use_at_once(tmp_path):
    program = (
        "import sys; from pathlib import Path; "
        "from ptycho_stream.models.active import ActiveModels; "
        "note = ActiveModels(Path(sys.argv[1])); "
        "[note.push(f'{sys.argv[2]}-{turn}') for turn in range(20)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), name]) for name in "ab"
    ]
    assert [writer.wait(30) for writer in writers] == [0, 0]
    history = ActiveModels(tmp_path).history()
    assert sorted(history) == sorted(f"{name}-{turn}" for name in "ab" for turn in range(20))


def test_a_model_is_copied_whole_for_another_machine(registry, tmp_path):
    registry.use("mine")
    place = registry.export("default", tmp_path / "stick")
    assert place == tmp_path / "stick" / "mine"
    assert ModelRegistry(tmp_path / "stick").load("mine")[1] == registry.load("mine")[1]
    with pytest.raises(ModelError, match="exists"):
        registry.export("mine", tmp_path / "stick")
    (registry.root / "mine" / WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(ModelError, match="truncated"):
        registry.export("mine", tmp_path / "other")
    assert not (tmp_path / "other").exists()
