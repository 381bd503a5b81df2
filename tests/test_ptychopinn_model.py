"""A bundle's models, its archive, and what is never read from one."""

import io
import json
import os
import pickle
import threading
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from ptychopinn_scans import SIZE, make_scan, write_files
from typer.testing import CliRunner

from ptycho_stream.cli.models import app
from ptycho_stream.errors import ModelError, PtychoPinnError
from ptycho_stream.geometry import patch_corners
from ptycho_stream.models.registry import ModelRegistry
from ptycho_stream.physics.forward import poisson_nll
from ptycho_stream.physics.probe import Probe
from ptycho_stream.ptychopinn import comparators, forward
from ptycho_stream.ptychopinn.archive_manifest import JSON_FILE, PICKLE_FILE, unpickled
from ptycho_stream.ptychopinn.bundle import (
    ARCHIVE_FILE,
    Bundle,
    load_bundle,
    registry_bundle,
    save,
)
from ptycho_stream.ptychopinn.config import ModelConfig, TrainingConfig
from ptycho_stream.ptychopinn.execution import ExecutionConfig
from ptycho_stream.ptychopinn.model import PtychoModel, load_inference_bundle
from ptycho_stream.ptychopinn.model_inputs import model_inputs
from ptycho_stream.ptychopinn.raw_data import RawData
from ptycho_stream.ptychopinn.reconstruction import predict
from ptycho_stream.ptychopinn.runnable import new_network
from ptycho_stream.reconstruct.predict import Predictor
from ptycho_stream.training.losses import frame_errors

# The forward model


@pytest.fixture
def golden(data_folder):
    with np.load(data_folder / "ptychopinn_forward_golden.npz") as held:
        values = {name: held[name] for name in held.files}
    values["x"] = values["x_real"] + 1j * values["x_imag"]
    values["probe"] = values["probe_real"] + 1j * values["probe_imag"]
    return values


def intensity(implementation, x, probe, scale):
    if implementation is comparators:
        return comparators.expected_intensity(x, probe, scale)
    arguments = (torch.as_tensor(each) for each in (x, probe, scale))
    return forward.expected_intensity(*arguments).numpy()


both = pytest.mark.parametrize("implementation", [forward, comparators], ids=["torch", "numpy"])


@both
def test_the_forward_model_is_the_golden_one(golden, implementation):
    found = intensity(implementation, golden["x"], golden["probe"], golden["scale"].reshape(1))
    expected = golden["expected_forward"]
    assert found.shape == expected.shape == (1, 1, 64, 64)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * expected.max())
    counts = golden["I_raw"].astype(np.float64)
    off = np.abs(np.square(found.astype(np.float64)) - counts).mean()
    assert off == pytest.approx(178.5500, rel=1e-5)


@both
def test_the_likelihood_is_the_golden_one(golden, implementation):
    found = intensity(implementation, golden["x"], golden["probe"], golden["scale"].reshape(1))
    if implementation is comparators:
        value = comparators.poisson_nll(found, golden["I_raw"])
    else:
        counts = torch.as_tensor(golden["I_raw"]).double()
        value = float(poisson_nll(torch.as_tensor(found).double(), counts))
    assert value == pytest.approx(116484.445, rel=1e-6)


@both
def test_modes_channels_and_scales_are_told_apart(implementation):
    rng = np.random.default_rng(0)

    def waves(*shape):
        return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)

    x, probe, scale = waves(3, 4, 8, 8), waves(2, 8, 8), np.array([1, 2, 3], np.float32)
    found = intensity(implementation, x, probe, scale)
    for group in range(3):
        for channel in range(4):
            exit_waves = scale[group] * probe * x[group, channel]
            spectrum = np.fft.fft2(exit_waves, norm="ortho")
            expected = np.fft.fftshift((np.abs(spectrum) ** 2).sum(0))
            np.testing.assert_allclose(found[group, channel], expected, rtol=2e-4, atol=1e-3)


# From frames to patches


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_files(folder, make_scan(40))
    return RawData.from_file(folder / "train_data.npz")


@pytest.fixture(scope="module")
def grouped(raw):
    return raw.generate_grouped_data(SIZE, K=8, nsamples=10, gridsize=2, seed=5)


@pytest.fixture(scope="module")
def bundle(raw):
    torch.manual_seed(1)
    model = ModelConfig(N=SIZE, gridsize=2, n_filters_scale=1)
    config = TrainingConfig(model=model, nphotons=1e6)
    return Bundle(new_network(model).eval(), config, Probe(raw.probeGuess), 1.1)


@pytest.fixture(scope="module")
def arguments(grouped, raw, bundle):
    x, positions = model_inputs(grouped)
    return [x, positions, raw.probeGuess, np.full(10, bundle.input_scale_factor, np.float32)]


def test_patches_have_the_channels_second(bundle, arguments, grouped):
    model = PtychoModel(bundle, ExecutionConfig(device="cpu"))
    found = model.diffraction_to_obj(*arguments)
    assert found.shape == (10, 4, SIZE, SIZE) and found.dtype == torch.complex64
    assert arguments[0].shape == (10, 4, SIZE, SIZE) and arguments[0].dtype == np.float32
    assert arguments[1].shape == (10, 4, 1, 2) and arguments[1].dtype == np.float32
    for channel in range(4):
        x, relative = grouped["X_full"], grouped["coords_relative"]
        np.testing.assert_array_equal(arguments[0][:, channel], x[..., channel])
        np.testing.assert_allclose(
            arguments[1][:, channel, 0], relative[:, 0, :, channel], rtol=1e-6
        )
    # A group's patches do not hang on the other groups.
    alone = model.diffraction_to_obj(
        *(each[3:4] for each in arguments[:2]), arguments[2], arguments[3][3:4]
    )
    torch.testing.assert_close(alone[0], found[3], rtol=1e-4, atol=1e-5)


def test_the_probe_s_scale_does_not_matter(bundle, arguments):
    """Trap: the probe scale divided twice."""
    model = PtychoModel(bundle, ExecutionConfig(device="cpu"))
    x, positions, probe, scale = arguments
    found = model.diffraction_to_obj(x, positions, probe, scale)
    torch.testing.assert_close(model.diffraction_to_obj(x, positions, 1e3 * probe, scale), found)
    frames = model.autoencoder(x, positions, probe, scale)
    torch.testing.assert_close(
        model.autoencoder(x, positions, 1e3 * probe, scale), frames, rtol=1e-4, atol=1e-2
    )


def test_the_unit_of_the_frames_does_not_matter(bundle, arguments):
    model = PtychoModel(bundle, ExecutionConfig(device="cpu"))
    x, positions, probe, scale = arguments
    found = model.diffraction_to_obj(x, positions, probe, scale)
    other = model.diffraction_to_obj(10 * x, positions, probe, scale / 10)
    torch.testing.assert_close(other, found, rtol=1e-4, atol=1e-5)


def test_true_patches_explain_the_frames_in_photons(raw, grouped, bundle):
    """Trap: x and y swapped between modules. Frames, probe, positions and object fit together."""
    known = torch.as_tensor(np.moveaxis(grouped["Y"], -1, 1).copy())
    measured = np.moveaxis(grouped["diffraction"], -1, 1)

    def misfit(patches):
        expected = forward.expected_intensity(patches, torch.as_tensor(raw.probeGuess))
        return np.abs(expected.sqrt().numpy() - measured).sum() / measured.sum()

    right = misfit(known)
    assert right < 0.05
    assert misfit(known.transpose(-1, -2)) > 3 * right
    assert misfit(known.flip(-1)) > 3 * right
    assert misfit(known[:, [1, 0, 3, 2]]) > 3 * right


def test_any_registry_model_gives_what_it_gives_live(tmp_path):
    """The patches differ by where they lie: at their frames here, on the pixel grid there."""
    scan = make_scan(24)
    photons = write_files(tmp_path, scan)
    raw = RawData.from_file(tmp_path / "train_data.npz")
    bundle = registry_bundle(
        "unrolled-v2", Probe(scan.probe), config=TrainingConfig(nphotons=photons)
    )
    grouped = raw.generate_grouped_data(SIZE, K=4, nsamples=24, sequential_sampling=True)
    here = predict(PtychoModel(bundle, ExecutionConfig(device="cpu")), raw, grouped)[:, 0]
    beam = bundle.probe.normalised(photons)
    corner, shift = patch_corners(raw.coords_xy[:, ::-1] - 0.5, (1.0, 1.0), SIZE)
    with Predictor(bundle.network, beam) as predictor:
        live, _ = predictor.predict(scan.counts, shift)
    on_grid = np.stack([scan.object[y : y + SIZE, x : x + SIZE] for y, x in corner])
    weight = np.broadcast_to(np.sqrt(beam.power_yx / beam.power_yx.max()), here.shape).copy()

    def error(patches, truth):
        tensors = (torch.as_tensor(each) for each in (patches, truth, weight))
        return float(frame_errors(*tensors)[1].mean())

    known = grouped["Y"][..., 0]
    assert error(here, known) < 1.1 * error(live, on_grid)
    assert error(here, known) < 0.8 * error(np.ones_like(known), known)


@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        (0, lambda x: np.moveaxis(x, 1, -1), r"move the channels"),
        (0, lambda x: x[:, :1], r"takes \(B, 4, 32, 32\)"),
        (0, lambda x: x * np.nan, "NaN"),
        (1, lambda p: p[:, :, 0], r"positions are \(10, 4, 2\)"),
        (1, lambda p: p + 40, "coords_relative, not positions on the sample"),
        (2, lambda p: p[0, :16, :16], r"the probe is \(16, 16\)"),
        (2, lambda p: 0 * p, "0 everywhere"),
        (3, lambda s: s[:3], "10 finite numbers"),
        (3, lambda s: -s, "10 finite numbers"),
        (3, lambda s: 5 * s, "photons in a frame on average"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(bundle, arguments, place, change, said):
    model = PtychoModel(bundle, ExecutionConfig(device="cpu"))
    changed = list(arguments)
    changed[place] = change(changed[place])
    with pytest.raises(PtychoPinnError, match=said):
        model.diffraction_to_obj(*changed)


def test_bad_pixels_are_not_looked_at(bundle, arguments):
    model = PtychoModel(bundle, ExecutionConfig(device="cpu"))
    valid = np.ones((SIZE, SIZE), bool)
    valid[5, 7] = False
    found = model.diffraction_to_obj(*arguments, valid)
    poisoned = arguments[0].copy()
    poisoned[..., 5, 7] = 50
    torch.testing.assert_close(model.diffraction_to_obj(poisoned, *arguments[1:], valid), found)
    with pytest.raises(PtychoPinnError, match="valid is bool"):
        model.diffraction_to_obj(*arguments, valid[:3])


# The archive


@pytest.fixture(scope="module")
def archive(bundle, tmp_path_factory):
    return save(bundle, tmp_path_factory.mktemp("model"))


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path, tmp_path, **changes):
    """The archive with members replaced; None removes one."""
    files = members(path) | {name.replace("__", "/"): held for name, held in changes.items()}
    target = tmp_path / ARCHIVE_FILE
    with zipfile.ZipFile(target, "w") as archive:
        for name, held in files.items():
            if held is not None:
                archive.writestr(name, held)
    return target


def test_a_bundle_comes_back_as_it_was(archive, bundle, arguments):
    model, config = load_inference_bundle(archive.parent, ExecutionConfig(device="cpu"))
    assert archive.name == "wts.h5.zip"
    assert config == bundle.config
    before = PtychoModel(bundle, ExecutionConfig(device="cpu")).diffraction_to_obj(*arguments)
    assert torch.equal(model.diffraction_to_obj(*arguments), before)
    np.testing.assert_array_equal(model.bundle.probe.modes, bundle.probe.modes)
    assert model.bundle.beam_ratio == bundle.beam_ratio


def test_the_manifest_is_a_plain_pickle_of_text_with_a_twin(archive):
    files = members(archive)
    told = pickle.loads(files["manifest.dill"])
    assert told["models"] == ["autoencoder", "diffraction_to_obj"]
    assert told["backend"] == "pytorch" and isinstance(told["version"], str)
    assert json.loads(files["manifest.json"]) == told
    assert unpickled(files["manifest.dill"], "here") == told
    folders = {name.split("/")[0] for name in files if "/" in name}
    assert folders == set(told["models"])


def test_how_it_was_computed_is_not_in_the_archive(archive, bundle, tmp_path):
    execution = ExecutionConfig(threads=7, workers=3, precision="bf16-mixed", mlflow_uri="here")
    PtychoModel(bundle, execution)
    again = members(save(bundle, tmp_path))
    created = "diffraction_to_obj/manifest.json"
    assert {n: c for n, c in again.items() if n != created} == {
        name: held for name, held in members(archive).items() if name != created
    }
    for name, held in again.items():
        if name.endswith(".json"):
            for word in (b"threads", b"workers", b"precision", b"strategy", b"mlflow", b"device"):
                assert word not in held, (name, word)


def manifest_of(**changes):
    told = {"models": ["autoencoder", "diffraction_to_obj"], "version": "1.0", "backend": "pytorch"}
    held = {name: value for name, value in (told | changes).items() if value is not None}
    return {PICKLE_FILE: pickle.dumps(held, protocol=2), JSON_FILE: None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "tensorflow"}, r"'tensorflow'.*'pytorch'"),
        ({"backend": None}, r"without a backend's name.*'pytorch'"),
        ({"version": "2.0-pytorch"}, r"layout '2.0-pytorch', known is '1.0'"),
        ({"models": ["autoencoder"]}, "lists the models"),
    ],
)
def test_other_backends_and_versions_are_refused_by_name(archive, tmp_path, changes, said):
    path = rewritten(archive, tmp_path, **manifest_of(**changes))
    with pytest.raises(ModelError, match=said):
        load_bundle(path)


def test_twins_that_differ_are_refused(archive, tmp_path):
    path = rewritten(archive, tmp_path, **{JSON_FILE: json.dumps({"backend": "pytorch"}).encode()})
    with pytest.raises(ModelError, match="differ"):
        load_bundle(path)


def test_the_pickle_alone_is_enough(archive, tmp_path):
    assert load_bundle(rewritten(archive, tmp_path, **manifest_of())).beam_ratio == 1.1


class Evil:
    def __init__(self, call, *arguments):
        self._call = call, arguments

    def __reduce__(self):
        return self._call


def test_code_in_a_manifest_is_named_and_never_run(archive, tmp_path):
    trap = tmp_path / "trap"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        evil = {"backend": Evil(os.mkdir, str(trap))}
        files = {PICKLE_FILE: pickle.dumps(evil, protocol=protocol), JSON_FILE: None}
        with pytest.raises(
            ModelError, match=r"is refused: it asks for (GLOBAL|STACK_GLOBAL|REDUCE)"
        ):
            load_bundle(rewritten(archive, tmp_path, **files))
        assert not trap.exists()


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"not a pickle",
        pickle.dumps({"backend": "pytorch"})[:-3],
        pickle.dumps(["backend"]),
        pickle.dumps({"backend": 3}),
        pickle.dumps({"backend": {"a": "b"}}),
        pickle.dumps({3: "pytorch"}),
        pickle.dumps({"models": [["a"]]}),
        pickle.dumps({"backend": {"pytorch"}}),
        pickle.dumps({"backend": b"pytorch"}),
        pickle.dumps({"x": "y" * (1 << 17)}),
        b"\x80\x02}r\xff\xff\xff\x7f.",  # remembers it in place 2**31
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # text of 2**63 bytes
        b"ca\nb\n.",
        b"(lp0\n0.",
        b"Q.",
    ],
)
def test_whatever_else_is_in_a_pickle_is_refused(held):
    with pytest.raises(ModelError, match="here"):
        unpickled(held, "here")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_text_of_any_protocol_is_read(protocol):
    told = {"models": ["a", "ü"], "backend": "b", "pair": ("c", "a")}
    assert unpickled(pickle.dumps(told, protocol=protocol), "here") == told | {"pair": ["c", "a"]}


@pytest.mark.parametrize(
    ("name", "held", "said"),
    [
        ("params.json", None, "lacks params.json"),
        ("params.json", b"[]", "no JSON object"),
        ("params.json", b'{"nepoch": 3}', "nepoch"),
        ("params.json", b'{"N": 32, "gridsize": 1}', "groups of 4 frames.*gridsize 1"),
        ("diffraction_to_obj__weights.safetensors", None, "lacks diffraction_to_obj/weights"),
        ("diffraction_to_obj__weights.safetensors", b"1234", "truncated or altered"),
        ("diffraction_to_obj__manifest.json", b"{", "cannot be read as JSON"),
        ("autoencoder__weights.safetensors", b"1234", "truncated or altered"),
        ("manifest.json", b"{", "not JSON"),
    ],
)
def test_what_is_missing_or_altered_is_named(archive, tmp_path, name, held, said):
    with pytest.raises(ModelError, match=said):
        load_bundle(rewritten(archive, tmp_path, **{name: held}))


def test_weights_of_another_network_are_refused(archive, bundle, tmp_path):
    """Trap: strict=False loads that leave random weights."""
    torch.manual_seed(2)
    model = replace(bundle.config.model, n_filters_scale=2)
    other = Bundle(new_network(model), replace(bundle.config, model=model), bundle.probe, 1.0)
    wider = members(save(other, tmp_path / "other"))
    manifest = json.loads(members(archive)["diffraction_to_obj/manifest.json"])
    weights = wider["diffraction_to_obj/weights.safetensors"]
    manifest["sha256"] = json.loads(wider["diffraction_to_obj/manifest.json"])["sha256"]
    path = rewritten(
        archive,
        tmp_path,
        **{
            "diffraction_to_obj/weights.safetensors": weights,
            "diffraction_to_obj/manifest.json": json.dumps(manifest).encode(),
        },
    )
    with pytest.raises(ModelError, match="weights do not fit"):
        load_bundle(path)


def test_what_is_no_archive_is_refused(archive, tmp_path):
    with pytest.raises(ModelError, match="there is no bundle"):
        load_bundle(tmp_path)
    path = tmp_path / ARCHIVE_FILE
    path.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(ModelError, match="no readable archive"):
        load_bundle(path)
    with zipfile.ZipFile(path, "w") as held:
        held.writestr("model.keras", b"")
    with pytest.raises(ModelError, match=r"has no manifest\.dill"):
        load_bundle(path)


def test_a_member_that_says_it_is_huge_is_not_read(archive, tmp_path, monkeypatch):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as held:
        held.writestr(PICKLE_FILE, b"\0" * (1 << 22))
    path = tmp_path / ARCHIVE_FILE
    path.write_bytes(bomb.getvalue())
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ModelError, match="at most 65536 are accepted"):
        load_bundle(path)


def test_an_archive_is_replaced_as_a_whole(bundle, tmp_path):
    save(bundle, tmp_path)
    failures = []

    def read():
        for _ in range(5):
            try:
                load_bundle(tmp_path)
            except ModelError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    while reader.is_alive():
        save(bundle, tmp_path)
    reader.join()
    assert not failures
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE_FILE]


def test_a_bundle_goes_into_a_registry_for_the_daemon(archive, bundle, tmp_path):
    arguments = ["import", str(archive), "--name", "mine", "--registry", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    network, manifest = ModelRegistry(tmp_path).load("mine")
    assert manifest.architecture == "cnn" and manifest.training["ptychopinn"]["gridsize"] == 2
    for name, weights in bundle.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], weights)
    assert CliRunner().invoke(app, [*arguments, "--prefix", "model."]).exit_code == 2


# How it is computed


def test_threads_are_set_back(bundle, arguments):
    before = torch.get_num_threads()
    seen = []
    model = PtychoModel(bundle, ExecutionConfig(device="cpu", threads=before + 2))
    real = model._network
    model._network = lambda *given: (seen.append(torch.get_num_threads()), real(*given))[1]
    model.diffraction_to_obj(*arguments)
    assert set(seen) == {before + 2}
    assert torch.get_num_threads() == before


def test_precision_changes_digits_and_nothing_else(bundle, arguments):
    exact = PtychoModel(bundle, ExecutionConfig(device="cpu")).diffraction_to_obj(*arguments)
    low = PtychoModel(bundle, ExecutionConfig(device="cpu", precision="bf16-mixed"))
    rough = low.diffraction_to_obj(*arguments)
    assert not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, rtol=0.1, atol=0.1)
    with pytest.raises(PtychoPinnError, match="for training"):
        PtychoModel(bundle, ExecutionConfig(device="cpu", precision="16-mixed"))
    with pytest.raises(ModelError, match=r"ExecutionConfig\.device"):
        PtychoModel(bundle, ExecutionConfig(device="cuda:99"))
