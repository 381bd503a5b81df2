"""State dicts from elsewhere: taken strictly, and nothing in them is run."""

import collections
import os
import pickle

import pytest
import torch
from typer.testing import CliRunner

from ptycho_stream.cli.models import app
from ptycho_stream.errors import ModelError
from ptycho_stream.models.foreign import import_state_dict
from ptycho_stream.models.manifest import Manifest
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.networks.cnn import CnnNetwork, CnnSettings

_SETTINGS = CnnSettings(size_px=32, n_filters_scale=1)
_MANIFEST = Manifest("mine", "cnn", _SETTINGS.to_json(), training={"model_type": "pinn"})


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return CnnNetwork(_SETTINGS).eval()


@pytest.fixture
def registry(tmp_path):
    return ModelRegistry(tmp_path / "models")


def saved(held, tmp_path, **options):
    path = tmp_path / "foreign.pt"
    torch.save(held, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_becomes_a_model(network, registry, tmp_path, zipped):
    path = saved(network.state_dict(), tmp_path, _use_new_zipfile_serialization=zipped)
    manifest = import_state_dict(path, _MANIFEST, registry)
    assert manifest.training["imported_from"] == "foreign.pt"
    assert manifest.training["model_type"] == "pinn" and len(manifest.sha256) == 64
    loaded, _ = registry.load("mine")
    for name, weights in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weights)


def test_a_checkpoint_with_a_prefix_and_half_precision(network, registry, tmp_path):
    weights = {f"model.{name}": value.half() for name, value in network.state_dict().items()}
    weights["loss.scale"] = torch.ones(1)
    path = saved({"epoch": 3, "state_dict": weights, "lr": [1e-3]}, tmp_path)
    with pytest.raises(ModelError, match="missing"):
        import_state_dict(path, _MANIFEST, registry)
    import_state_dict(path, _MANIFEST, registry, prefix="model.")
    assert next(registry.load("mine")[0].parameters()).dtype == torch.float32
    other = Manifest("other", "cnn", _SETTINGS.to_json())
    with pytest.raises(ModelError, match=r"begin with 'net\.'"):
        import_state_dict(path, other, registry, prefix="net.")


def test_one_stored_number_does_not_become_a_tensor_of_any_size(registry, tmp_path):
    path = saved({"weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ModelError, match="more than"):
        import_state_dict(path, _MANIFEST, registry)


def _without(state):
    return {name: value for name, value in state.items() if name != "phase.leave.bias"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without, r"missing \['phase.leave.bias'\]"),
        (lambda s: s | {"extra.weight": torch.ones(1)}, r"unknown \['extra.weight'\]"),
        (lambda s: s | {"phase.leave.bias": torch.ones(7)}, r"phase.leave.bias \(7,\) instead of"),
        (lambda s: s | {"phase.leave.bias": torch.tensor([torch.nan])}, "NaN"),
        (lambda s: s | {"phase.leave.bias": torch.ones(1).long()}, "not plain real weights"),
        (lambda s: s | {"epoch": 3}, "'epoch': int among the weights"),
        (lambda _: [torch.ones(3)], "holds a list, not a state dict"),
        (lambda _: {}, "holds no weights"),
    ],
)
def test_what_does_not_fit_is_named(network, registry, tmp_path, change, said):
    path = saved(change(dict(network.state_dict())), tmp_path)
    with pytest.raises(ModelError, match=said):
        import_state_dict(path, _MANIFEST, registry)
    assert [model.name for model in registry.list()].count("mine") == 0


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_by_name_and_never_run(network, registry, tmp_path, zipped):
    trap = tmp_path / "trap"
    held = dict(network.state_dict()) | {"evil": Evil(str(trap))}
    path = saved(held, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"posix\.mkdir.*not\s+run"):
        import_state_dict(path, _MANIFEST, registry)
    assert not trap.exists()


def test_a_whole_pickled_network_is_refused(network, registry, tmp_path):
    with pytest.raises(ModelError, match=r"ptycho_stream\.networks\.cnn\.CnnNetwork"):
        import_state_dict(saved(network, tmp_path), _MANIFEST, registry)


def test_plain_pickles_and_damaged_files_are_refused(network, registry, tmp_path):
    whole = saved(network.state_dict(), tmp_path).read_bytes()
    cases = {
        "empty": b"",
        "text": b"not a model at all",
        "truncated": whole[: len(whole) // 2],
        "pickle": pickle.dumps(collections.Counter("abc"), protocol=2),
        "list": pickle.dumps([], protocol=2),
    }
    for name, content in cases.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"{name}.pt"):
            import_state_dict(path, _MANIFEST, registry)
    with pytest.raises(ModelError, match="No such file"):
        import_state_dict(tmp_path / "none.pt", _MANIFEST, registry)


def test_a_name_is_never_overwritten(network, registry, tmp_path):
    path = saved(network.state_dict(), tmp_path)
    import_state_dict(path, _MANIFEST, registry)
    with pytest.raises(ModelError, match="exists"):
        import_state_dict(path, _MANIFEST, registry)


def test_the_command_line_imports(network, tmp_path):
    path = saved(network.state_dict(), tmp_path)
    folder = str(tmp_path / "models")
    settings = '{"size_px": 32, "n_filters_scale": 1}'
    arguments = ["import", str(path), "--name", "mine", "--registry", folder]
    done = CliRunner().invoke(app, [*arguments, "--settings", settings, "--model-type", "pinn"])
    assert done.exit_code == 0, done.output
    assert "model mine is in" in done.output
    assert ModelRegistry(folder).load("mine")[1].training["model_type"] == "pinn"
    for bad in ("{", "[1]"):
        assert CliRunner().invoke(app, [*arguments, "--settings", bad]).exit_code == 2
