"""PandA over ZeroMQ: samples by their absolute numbers become positions of frames, each once."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Message, Positions, PositionsEnd, PositionsStart, Undecodable
from ptycho_stream.settings import PandaSettings
from ptycho_stream.wire import PatientDecoder, WireLimits
from ptycho_stream.wire.panda import PandaDecoder
from ptycho_stream.wire.panda_arming import QUIET_NS, WINDOW
from ptycho_stream.wire.panda_encoder import PandaEncoder
from ptycho_stream.wire.sample_frames import SampleFrames

Y, X, I0, GATE = "/INENC3.VAL.Value", "/INENC2.VAL.Value", "/COUNTER1.OUT.Diff", "/TTLIN1.VAL"
RANDOM = np.random.default_rng(1)


class Panda:
    """A decoder with a clock that the test turns."""

    def __init__(self, limits: WireLimits | None = None, **options: Any) -> None:
        fields = {"y": Y, "x": X, "scale_yx_m": (1e-9, 1e-9), **options}
        self.settings = PandaSettings(**fields)
        self.now_ns = 10 * QUIET_NS
        self.decoder = PandaDecoder(self.settings, limits, lambda: self.now_ns)

    def take(self, *messages: list[bytes]) -> list[Message]:
        return [found for parts in messages for found in self.decoder.receive(parts)]

    def quiet(self) -> list[Message]:
        self.now_ns += QUIET_NS
        return self.decoder.overdue()


def samples(many: int) -> np.ndarray:
    """Counts (many, 2) of y and x."""
    return RANDOM.normal(0, 1e4, (many, 2))


def cut(encoder: PandaEncoder, counts: np.ndarray, size: int, first: int = 0) -> list[list[bytes]]:
    """Data messages of ``size`` samples each."""
    return [
        encoder.data(first + at, {Y: counts[at : at + size, 0], X: counts[at : at + size, 1]})
        for at in range(0, len(counts), size)
    ]


def found(messages: list[Message]) -> dict[int, tuple[float, ...]]:
    """The last position of each frame."""
    return {
        number: tuple(where)
        for message in messages
        if isinstance(message, Positions)
        for number, where in zip(
            message.numbers.tolist(), message.position_yx_m.tolist(), strict=True
        )
    }


def kinds(messages: list[Message]) -> list[str]:
    return [type(message).__name__ for message in messages]


def means(counts: np.ndarray, per_frame: int) -> dict[int, tuple[float, ...]]:
    """What comes of samples that are all there, by the same arithmetic."""
    whole = counts[: len(counts) // per_frame * per_frame].T.reshape(2, -1, per_frame)
    where = np.ascontiguousarray(whole).sum(axis=2) / per_frame * 1e-9
    return {number: tuple(yx) for number, yx in enumerate(where.T.tolist())}


# ---- a run that goes well ----------------------------------------------------------------------


@pytest.mark.parametrize("per_frame", [1, 10])
@pytest.mark.parametrize("size", [1, 41, 1000])
def test_a_frame_is_where_the_mean_of_its_samples_is(per_frame, size):
    panda, encoder, counts = Panda(samples_per_frame=per_frame), PandaEncoder("12:00"), samples(410)
    out = panda.take(encoder.start(), *cut(encoder, counts, size), encoder.stop())
    assert out[0] == PositionsStart("panda 12:00", None, {"panda_arm_time": "12:00"})
    assert out[-1] == PositionsEnd("panda 12:00")
    assert found(out) == means(counts, per_frame)
    assert kinds(out).count("Undecodable") == 0


def test_counts_become_metres_with_scale_sign_and_offset():
    panda = Panda(scale_yx_m=(-2e-9, 1e-9), offset_yx_m=(1e-3, -1e-3))
    out = panda.take(PandaEncoder("a").data(0, {Y: [10.0, 0.0], X: [10.0, 0.0]}))
    np.testing.assert_array_equal(
        list(found(out).values()), [(-2e-8 + 1e-3, 1e-8 - 1e-3), (1e-3, -1e-3)]
    )


def test_samples_before_the_first_frame_belong_to_none():
    panda, counts = Panda(samples_per_frame=2, first_sample=5), samples(11)
    out = panda.take(*cut(PandaEncoder("a"), counts, 4))
    assert found(out) == means(counts[5:], 2)


def test_a_beam_monitor_is_averaged_or_summed():
    for i0_from, expected in (("mean", [2.0, 5.0]), ("sum", [6.0, 15.0])):
        panda = Panda(samples_per_frame=3, i0=I0, i0_from=i0_from)
        values = {Y: np.zeros(6), X: np.zeros(6), I0: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
        (_, message) = panda.take(PandaEncoder("a").data(0, values))
        assert isinstance(message, Positions) and message.i0 is not None
        assert message.i0.tolist() == expected


def test_a_frame_is_left_out_where_the_shutter_was_closed_for_one_of_its_samples():
    for gate_open, expected in (("above", [False, True, True]), ("below", [True, True, False])):
        panda = Panda(samples_per_frame=2, gate=GATE, gate_open=gate_open)
        values = {Y: np.zeros(6), X: np.zeros(6), GATE: [1, 1, 1, 0, 0, 0]}
        (_, message) = panda.take(PandaEncoder("a").data(0, values))
        assert isinstance(message, Positions) and message.skip is not None
        assert message.skip.tolist() == expected


def test_samples_that_are_no_numbers_leave_their_frames_without_a_position():
    data = {"dtype": "float64", "size": 3, "starting_sample_number": 0, "data": [1.0, 2.0, 3.0]}
    message = {"msg_type": "data", "frame_number": 0, "datasets": {Y: data, X: data}}
    text = json.dumps(message).replace("2.0", "NaN")
    where = found(Panda().take([text.encode()]))
    assert where[0] == (1e-9, 1e-9) and np.isnan(where[1]).all()
    assert where[2] == (3 * 1e-9, 3 * 1e-9)


# ---- messages that are lost, doubled, late -----------------------------------------------------


def test_a_lost_message_costs_its_own_frames_only():
    panda, encoder, counts = Panda(samples_per_frame=10), PandaEncoder("a"), samples(410)
    messages = cut(encoder, counts, 41)
    out = panda.take(encoder.start(), *messages[:3], *messages[4:], encoder.stop())
    expected = means(counts, 10)
    lost = range(123 // 10, 163 // 10 + 1)  # samples 123 to 163
    assert found(out) == {n: where for n, where in expected.items() if n not in lost}
    assert "PositionsEnd" not in kinds(out)  # it might have been overtaken
    torn, end = panda.quiet()
    assert isinstance(torn, Undecodable) and torn.reason == "torn"
    assert (torn.count, torn.epoch) == (2, "panda a")
    assert "frame 12 has 3 of 10" in torn.detail and "min_fraction" in torn.detail
    assert end == PositionsEnd("panda a")
    assert panda.quiet() == []


def test_enough_of_its_samples_give_a_frame_a_position_when_no_more_will_come():
    panda, encoder = Panda(samples_per_frame=10, min_fraction=0.3), PandaEncoder("a")
    counts = samples(410)
    messages = cut(encoder, counts, 41)
    out = panda.take(encoder.start(), *messages[:3], *messages[4:])
    assert found(out).keys().isdisjoint(range(12, 17))
    partial = found(panda.quiet())  # later samples have come
    assert partial.keys() == {12, 16}
    assert partial[12] == pytest.approx(counts[120:123].mean(axis=0) * 1e-9, rel=1e-12)
    assert partial[16] == pytest.approx(counts[164:170].mean(axis=0) * 1e-9, rel=1e-12)
    assert found(panda.take(messages[3])) == {n: means(counts, 10)[n] for n in range(12, 17)}


def test_a_frame_that_is_being_taken_gets_no_position_of_its_first_samples():
    panda, encoder = Panda(samples_per_frame=10, min_fraction=0.1), PandaEncoder("a")
    counts = samples(12)
    panda.take(encoder.start(), *cut(encoder, counts, 12))
    assert panda.quiet() == []
    panda.take(encoder.stop())
    panda = Panda(samples_per_frame=10, min_fraction=0.1)
    out = panda.take(encoder.start(), *cut(PandaEncoder("b"), counts, 12), encoder.stop())
    assert found([*out, *panda.quiet()]).keys() == {0, 1}


def test_frames_left_thousands_of_samples_behind_are_settled_while_the_run_goes_on():
    panda, encoder = Panda(samples_per_frame=10, min_fraction=0.5), PandaEncoder("a")
    counts = samples(20_000)
    messages = cut(encoder, counts, 1005)
    out = panda.take(*messages[:1], *messages[2:])
    assert 100 in found(out)  # 5 of its samples have come
    assert found(out).keys().isdisjoint(range(101, 201))


def test_doubled_messages_count_once_and_reordered_ones_as_they_are():
    panda, encoder, counts = Panda(samples_per_frame=10), PandaEncoder("a"), samples(410)
    messages = cut(encoder, counts, 41)
    order = [3, 0, 1, 1, 2, 5, 4, 9, 3, 8, 7, 6, 0]
    start, stop = encoder.start(), encoder.stop()
    out = panda.take(start, start, *(messages[n] for n in order), stop, stop)
    assert found(out) == means(counts, 10)
    assert sum(len(m.numbers) for m in out if isinstance(m, Positions)) == 41
    assert kinds(out).count("PositionsStart") == kinds(out).count("PositionsEnd") == 1


def test_a_stop_that_overtakes_data_waits_for_them():
    panda, encoder, counts = Panda(), PandaEncoder("a"), samples(82)
    first, second = cut(encoder, counts, 41)
    assert kinds(panda.take(encoder.start(), second, encoder.stop()))[-1] == "Positions"
    assert kinds(panda.take(first)) == ["Positions", "PositionsEnd"]


# ---- starts ------------------------------------------------------------------------------------


def test_a_run_whose_start_is_lost_is_an_epoch_of_its_own():
    panda, encoder, counts = Panda(), PandaEncoder("a"), samples(82)
    out = panda.take(*cut(encoder, counts, 41), encoder.stop())
    assert isinstance(out[0], PositionsStart) and not out[0].joined
    assert found(out) == means(counts, 1)
    assert out[-1] == PositionsEnd(out[0].epoch)


def test_a_run_that_is_joined_says_so():
    panda, encoder, counts = Panda(samples_per_frame=10), PandaEncoder("a"), samples(410)
    out = panda.take(*cut(encoder, counts, 41)[4:], encoder.stop())
    assert isinstance(out[0], PositionsStart) and out[0].joined
    assert found(out) == {n: yx for n, yx in means(counts, 10).items() if n >= 17}
    assert kinds(out)[-1] == "PositionsEnd"  # nothing is missing since


def test_a_start_that_data_have_overtaken_is_theirs():
    panda, encoder, counts = Panda(), PandaEncoder("a"), samples(82)
    first, second = cut(encoder, counts, 41)
    (begun, _), (again,) = panda.take(second), panda.take(encoder.start())
    assert isinstance(begun, PositionsStart) and isinstance(again, PositionsStart)
    assert again == PositionsStart(begun.epoch, None, {"panda_arm_time": "a"})
    assert kinds(panda.take(first, encoder.stop(), encoder.start())) == [
        "Positions",
        "PositionsEnd",
    ]


def test_a_start_long_after_the_data_is_of_the_next_run():
    panda = Panda()
    panda.take(*cut(PandaEncoder("a"), samples(41), 41))
    panda.quiet()
    out = panda.take(PandaEncoder("b").start())
    assert kinds(out) == ["PositionsEnd", "PositionsStart"]
    assert out[1].epoch == "panda b"


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_a_panda_that_is_armed_again_begins_anew_stopped_or_not_heard_or_not(stopped, started):
    panda, former, counts = Panda(), PandaEncoder("a"), samples(82)
    panda.take(former.start(), *cut(former, samples(123), 41))
    ended = panda.take(former.stop()) if stopped else []
    encoder = PandaEncoder("b")
    messages = cut(encoder, counts, 41)
    out = panda.take(*([encoder.start()] if started else []), *messages, encoder.stop())
    assert kinds(ended + out).count("PositionsEnd") == 2
    begun = next(m for m in out if isinstance(m, PositionsStart))
    assert begun.epoch == "panda b" if started else not begun.joined
    assert {m.epoch for m in out if isinstance(m, Positions)} == {begun.epoch}
    assert found(out) == means(counts, 1)


def test_after_a_long_silence_a_message_that_was_missing_is_another_runs():
    panda, counts = Panda(), samples(82)
    former = cut(PandaEncoder("a"), samples(123), 41)
    panda.take(former[0], former[2])
    panda.now_ns += 10 * QUIET_NS
    out = panda.take(*cut(PandaEncoder("b"), counts, 41)[1:])
    assert [type(m) for m in out] == [PositionsEnd, PositionsStart, Positions]
    assert found(out) == {n: yx for n, yx in means(counts, 1).items() if n >= 41}


def test_a_stop_of_the_former_run_does_not_end_the_one_that_goes_on():
    panda, encoder, counts = Panda(), PandaEncoder("b"), samples(205)
    late = PandaEncoder("a")
    cut(late, samples(82), 41)
    first, *rest = cut(encoder, counts, 41)
    out = panda.take(encoder.start(), first, late.stop(), *rest, encoder.stop())
    assert found(out) == means(counts, 1)
    assert out[-1] == PositionsEnd("panda b")
    assert {m.epoch for m in out if isinstance(m, Positions)} == {"panda b"}


def test_an_arm_time_that_is_no_name_is_replaced():
    for arm_time in ("a\nb", "x" * 1000):
        (begun,) = Panda().take(PandaEncoder(arm_time).start())
        assert isinstance(begun, PositionsStart)
        assert begun.epoch.isprintable() and len(begun.epoch) < 200
        assert begun.metadata.keys() == {"panda_arm_time"}
    (begun,) = Panda().take([b'{"msg_type":"start","arm_time":1.5}'])
    assert begun.epoch == "panda 1.5"


def test_what_a_start_says_is_bounded():
    (begun,) = Panda().take(PandaEncoder("a").start(note="n" * 100_000, beamline="3-ID"))
    assert begun.metadata == {
        "panda_arm_time": "a",
        "panda_beamline": "3-ID",
        "panda_left_out": ["note"],
    }


# ---- what is refused ---------------------------------------------------------------------------


def data(**changes: Any) -> list[bytes]:
    dataset = {"dtype": "float64", "size": 1, "starting_sample_number": 0, "data": [1.0]}
    message = {"msg_type": "data", "frame_number": 0, "datasets": {Y: dataset, X: dataset}}
    for key, value in changes.items():
        (dataset if key in dataset else message)[key] = value
    return [json.dumps(message).encode()]


@pytest.mark.parametrize(
    ("parts", "reason", "said"),
    [
        ([b""], "malformed", "not a message of PandA"),
        ([b"{"], "malformed", "not a message of PandA"),
        ([b'{"msg_type":"arm"}'], "malformed", "not a message of PandA"),
        ([b"[" * 100_000], "malformed", "not a message of PandA"),
        ([b"\x80\x04\x95"], "malformed", "not a message of PandA"),
        ([b"{}", b"{}"], "torn", "one part"),
        (data(frame_number=-1), "malformed", "negative"),
        (data(frame_number=1.5), "malformed", "not a message of PandA"),
        (data(size=2), "malformed", "says 2 values and has 1"),
        (data(data=["a"]), "malformed", "something else than numbers"),
        (data(data=5), "malformed", "something else than numbers"),
        (data(data=[[1.0]]), "malformed", "something else than numbers"),
        (data(starting_sample_number=2**60), "limit", "outside 0 to"),
        (data(datasets={}), "malformed", "has no dataset '/INENC3.VAL.Value', only none"),
        (
            data(datasets={"/OTHER": {"starting_sample_number": 0, "data": []}}),
            "malformed",
            "only /OTHER: correct positions.panda.y",
        ),
    ],
)
def test_what_is_no_message_of_a_panda_is_said_and_costs_nothing_else(parts, reason, said):
    panda, encoder, counts = Panda(), PandaEncoder("a"), samples(82)
    first, second = cut(encoder, counts, 41)
    out = panda.take(encoder.start(), first, parts, second, encoder.stop())
    (bad,) = [m for m in out if isinstance(m, Undecodable)]
    assert bad.reason == reason
    assert said in bad.detail
    assert found(out) == means(counts, 1)


def test_messages_are_bounded_before_anything_is_made_of_them():
    panda = Panda(WireLimits(max_positions=100, max_header_bytes=1000))
    (bad,) = panda.take(data(data=[1.0] * 101, size=101))
    assert isinstance(bad, Undecodable) and bad.reason == "limit"
    (bad,) = panda.take([b'{"msg_type":"start","x":"' + b"a" * 10_000 + b'"}'])
    assert isinstance(bad, Undecodable) and bad.reason == "limit"


def test_wild_sample_numbers_cost_little_memory():
    panda = Panda(samples_per_frame=10)
    tracemalloc.start()
    lost = 0
    for n in range(1000):
        out = panda.take(data(frame_number=n, starting_sample_number=n * 10_000_000))
        lost += sum(m.count for m in out if isinstance(m, Undecodable))
    assert tracemalloc.get_traced_memory()[0] < 100_000_000
    tracemalloc.stop()
    assert 0 < lost < 1000
    (rest, *_) = panda.take(PandaEncoder("b").start())
    assert isinstance(rest, Undecodable)
    assert lost + rest.count == 999  # the newest one is not known to be lost


@settings(max_examples=150)
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)), st.booleans())
def test_no_bytes_raise(part, begun):
    panda = Panda(min_fraction=0.5)
    if begun:
        panda.take(PandaEncoder("a").start())
    panda.take([part])
    panda.quiet()


def json_values() -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text()
    return st.recursive(
        plain, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )


@settings(max_examples=150)
@given(
    kind=st.sampled_from(["start", "data", "stop"]),
    key=st.sampled_from(["arm_time", "emitted_frames", "frame_number", "datasets"])
    | st.sampled_from(["starting_sample_number", "data", "size", "dtype"]),
    value=json_values(),
)
def test_no_value_of_any_key_raises(kind, key, value):
    panda = Panda()
    panda.take(data(**{key: value, "msg_type": kind}))
    panda.take(data(frame_number=1))
    panda.quiet()


# ---- samples -----------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    per_frame=st.integers(1, 7),
    runs=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=25),
    data=st.data(),
)
def test_each_frame_that_has_all_its_samples_is_given_out_once(per_frame, runs, data):
    frames = SampleFrames(2, per_frame)
    steps = [(column, first, size) for first, size in runs for column in (0, 1)]
    come: tuple[set[int], set[int]] = (set(), set())
    given_out: dict[int, list[float]] = {}
    for column, first, size in data.draw(st.permutations(steps)):
        touched = frames.add(column, first, np.arange(first, first + size, dtype=float))
        come[column].update(range(first, first + size))
        for ready in frames.ready(touched):
            assert ready.known.all()
            for number, mean in zip(ready.numbers.tolist(), ready.means().T.tolist(), strict=True):
                assert number not in given_out
                given_out[number] = mean
    both = come[0] & come[1]
    whole = {n for n in range(80) if set(range(n * per_frame, (n + 1) * per_frame)) <= both}
    assert given_out.keys() == whole
    for number, mean in given_out.items():
        expected = number * per_frame + (per_frame - 1) / 2
        assert mean == pytest.approx([expected, expected])


def test_the_decoder_waits_for_what_is_overdue():
    assert isinstance(Panda().decoder, PatientDecoder)
    assert WINDOW >= 64
