"""Pairs that are lent to helpers: the image is the one that a process alone would have made."""

from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import zmq
from image_bench import Bench, running_scan, shipped_recipe

from ptycho_stream.errors import MalformedMessage, ModelError
from ptycho_stream.physics.probe import Probe
from ptycho_stream.reconstruct.lending import LentScan, Loan, Made
from ptycho_stream.reconstruct.open_scan import OpenScan
from ptycho_stream.results import Image
from ptycho_stream.scans import ScanReader
from ptycho_stream.scans.append_log import FRAMES_LOG
from ptycho_stream.scans.records import FRAME_RECORD
from ptycho_stream.simulate.experiment import simulate_experiment
from ptycho_streamd.lender import HELLO, MADE, Lender, endpoint_in

SIZE = 64


@pytest.fixture(scope="module")
def experiment():
    return simulate_experiment(seed=5, frames=60, size_px=SIZE)


@pytest.fixture(scope="module")
def recipe(experiment):
    return shipped_recipe(experiment)


@pytest.fixture
def bench(experiment, recipe, tmp_path):
    with running_scan(tmp_path, experiment, recipe) as held:
        yield held


def help_with(bench: Bench, loan: Loan, recipe=None) -> Made:
    """What another process makes of a loan: all that it knows came as bytes."""
    with ScanReader.open(bench.root, loan.scan_id) as reader:
        scan = LentScan(reader, recipe or bench.recipe, Loan.decode(loan.encode()))
        return Made.decode(scan.make(loan, lambda: None).encode())


def alone(bench: Bench):
    image = bench.open()
    while image.has_work:
        image.step(16, list[int]().extend)
    return image


def shown(image):
    return Image(image.image(final=False))


def test_an_image_made_with_helpers_is_that_of_one_process(bench):
    bench.write(range(60))
    image = bench.open()
    loans = []
    while image.has_work:
        if image.can_step:
            image.step(7, list[int]().extend)
        loans += [loan for _ in range(2) if (loan := image.lend(5)) is not None]
        if loans:
            loan = loans.pop(0)
            taken = image.take_back(loan, help_with(bench, loan))
            assert len(taken) == len(loan.indices)
    held, wanted = shown(image), shown(alone(bench))
    assert sorted(held.frame_numbers.tolist()) == list(range(60))
    assert image.current.ledger.lent_count == 0
    seen = np.isfinite(wanted.object_yx)
    assert np.array_equal(seen, np.isfinite(held.object_yx))
    error = np.abs(held.object_yx - wanted.object_yx)[seen]
    assert error.max() <= 1e-5 * np.abs(wanted.object_yx[seen]).max()
    assert held.spread == pytest.approx(wanted.spread, abs=0.2)


def test_a_loan_that_comes_to_nothing_is_done_again_and_never_counted_twice(bench):
    bench.write(range(40))
    image = bench.open()
    image.step(8, list[int]().extend)
    lost, late = image.lend(8), image.lend(8)
    assert lost is not None and late is not None
    assert not set(lost.indices) & set(late.indices)
    made = help_with(bench, late)
    assert len(image.take_back(lost, None)) == len(image.take_back(late, None)) == 0
    while image.can_step:
        image.step(8, list[int]().extend)
    assert not image.has_work
    assert sorted(shown(image).frame_numbers.tolist()) == list(range(40))
    assert made.generation.ledger.count == 8


def test_what_is_lent_is_in_no_saved_image(bench):
    bench.write(range(30))
    image = bench.open()
    image.step(10, list[int]().extend)
    assert image.lend(10) is not None
    image.save()
    again = bench.open()
    assert len(again.current.ledger.added) == 10 and again.pending == 20
    while again.has_work:
        again.step(16, list[int]().extend)
    assert sorted(shown(again).frame_numbers.tolist()) == list(range(30))


def test_nothing_is_taken_for_a_generation_that_is_gone(bench, recipe):
    bench.write(range(20))
    image = bench.open()
    image.step(5, list[int]().extend)
    loan = image.lend(10)
    made = help_with(bench, loan)
    image.use(replace(recipe, model="renamed"))
    while image.can_step:
        image.step(20, list[int]().extend)
    assert len(image.take_back(loan, made)) == 0
    assert sorted(shown(image).frame_numbers.tolist()) == list(range(20))


def test_nothing_is_taken_that_a_former_image_of_the_scan_has_lent(bench):
    bench.write(range(20))
    image = bench.open()
    image.step(5, list[int]().extend)
    image.save()
    loan = image.lend(10)
    made = help_with(bench, loan)
    again = bench.open()  # as when the stage leaves a scan alone and comes back to it
    while again.has_work:
        again.step(20, list[int]().extend)
    assert again.current.identity.to_json() == loan.identity
    assert len(again.take_back(loan, made)) == len(again.take_back(loan, None)) == 0
    assert not again.has_work and again.current.ledger.lent_count == 0
    assert sorted(again.current.ledger.added.tolist()) == list(range(20))


def test_nothing_is_taken_for_a_generation_that_was_dropped_and_begun_again(bench, recipe):
    bench.write(range(60))
    image, other = alone(bench), replace(recipe, model="renamed")
    image.use(other)
    image.step(10, list[int]().extend)
    loan = image.lend(10)
    made = help_with(bench, loan, other)
    for wanted in (recipe, other):
        image.use(wanted)
        image.step(10, list[int]().extend)
    while image.can_step:
        image.step(20, list[int]().extend)
    assert image.current.identity.to_json() == loan.identity
    assert len(image.take_back(loan, made)) == 0
    assert sorted(image.current.ledger.added.tolist()) == list(range(60))


def test_a_new_generation_is_made_with_helpers_too(bench, recipe):
    bench.write(range(60))
    image = alone(bench)
    image.use(replace(recipe, model="renamed"))
    image.step(10, list[int]().extend)
    assert image.following is not None
    while image.has_work:
        loan = image.lend(20)
        assert loan is not None and loan.generation == image.following.number
        image.take_back(loan, help_with(bench, loan, replace(recipe, model="renamed")))
    assert image.following is None and image.current.identity.model == "renamed"
    assert sorted(shown(image).frame_numbers.tolist()) == list(range(60))


def test_a_helper_takes_the_probe_that_the_image_is_made_with(bench, recipe):
    """The helper would take another one: that of a scan which has ended since, for example."""
    bench.write(range(40))
    image = bench.open()
    image.step(5, list[int]().extend)
    other = replace(recipe, probe=Probe(np.flip(recipe.probe.modes, -1).copy() * 1j))
    while image.has_work:
        loan = image.lend(40)
        assert loan is not None
        assert len(image.take_back(loan, help_with(bench, loan, other))) == 35
    held, wanted = shown(image), shown(alone(bench))
    seen = np.isfinite(wanted.object_yx)
    error = np.abs(held.object_yx - wanted.object_yx)[seen]
    assert error.max() <= 1e-5 * np.abs(wanted.object_yx[seen]).max()


def test_a_helper_with_another_model_or_without_a_probe_refuses(bench, recipe):
    bench.write(range(20))
    image = bench.open()
    image.step(5, list[int]().extend)
    loan = image.lend(5)
    with pytest.raises(ModelError, match="another model"):
        help_with(bench, loan, replace(recipe, model_sha256="0" * 64))
    with pytest.raises(MalformedMessage, match="without its probe"):
        help_with(bench, loan.to_who_has_the_probe())


def test_damaged_frames_are_named_to_who_lent_them(bench):
    bench.write(range(20))
    image = bench.open()
    image.step(5, list[int]().extend)
    loan = image.lend(15)
    slot = int(image.reader.pairs(int(loan.indices[3]), int(loan.indices[3]) + 1)["slot"][0])
    file = min(bench.root.rglob("frames*"))
    frame_bytes = image.reader.header.frame_bytes
    data = bytearray(file.read_bytes())
    data[slot * frame_bytes + 40] ^= 0xFF
    file.write_bytes(data)
    made = help_with(bench, loan)
    assert made.damaged == [slot]
    image.take_back(loan, made)
    assert image.counts()["skipped"] == 1 and not image.has_work


@pytest.fixture
def context():
    with zmq.Context() as held:
        yield held


def test_a_loan_of_a_stage_that_died_is_not_taken_for_one_of_the_next(bench, context, tmp_path):
    bench.write(range(60))
    helper, loans = context.socket(zmq.DEALER), list[Loan]()
    with helper:
        helper.setsockopt(zmq.LINGER, 0)
        helper.connect(endpoint_in(tmp_path))
        numbers = list[bytes]()
        for _ in range(2):
            image = bench.open()
            image.step(4, list[int]().extend)
            scans = cast("dict[str, OpenScan]", {"s": SimpleNamespace(parked=False, image=image)})
            lender = Lender(context, tmp_path)
            with closing(lender):
                helper.send_multipart([HELLO, b"0.05"])
                assert lender.socket.poll(10_000)
                assert not list(lender.returned()) and lender.helpers == 1
                lender.lend(scans, enough=0)
                for _ in range(2):
                    assert helper.poll(10_000)
                    number, data = helper.recv_multipart()
                    numbers.append(number)
                    loans.append(Loan.decode(data))
                first, second = loans[-2:]
                assert first.probe is not None and second.probe is None
                made = help_with(bench, loans[0]).encode()
                helper.send_multipart([MADE, numbers[0], b"0.05", made])
                assert lender.socket.poll(10_000)
                returned = list(lender.returned())
                assert len(returned) == (1 if len(numbers) == 2 else 0)
    assert len(set(numbers)) == 4


@pytest.mark.parametrize("slot", [0, 3])
@pytest.mark.parametrize("saved", [False, True])
def test_a_frame_whose_record_is_damaged_is_left_out_and_stops_no_other(bench, saved, slot):
    bench.write(range(20))
    image = bench.open()
    if saved:
        image.step(10, list[int]().extend)
        image.save()
    log = next(bench.root.rglob(FRAMES_LOG))
    data = bytearray(log.read_bytes())
    data[slot * FRAME_RECORD.itemsize + 8] ^= 0xFF
    log.write_bytes(data)
    image, damaged = bench.open(), list[int]()
    while image.can_step:
        image.step(5, damaged.extend)
        loan = image.lend(5)
        if loan is not None:
            made = help_with(bench, loan)
            damaged += made.damaged
            image.take_back(loan, made)
    assert not image.has_work
    assert saved or damaged == [slot]
    assert set(range(20)) - set(image.current.ledger.added.tolist()) == set(damaged)


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x94\xa1a\x01\xa1b\xa1c"])
def test_other_bytes_are_no_loan_and_no_result(data):
    with pytest.raises(MalformedMessage):
        Loan.decode(data)
    with pytest.raises(MalformedMessage):
        Made.decode(data)
