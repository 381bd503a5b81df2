"""Bluesky documents over 0MQ: events become positions, and what is pickled is never loaded."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptycho_stream.messages import Message, Positions, PositionsEnd, PositionsStart, Undecodable
from ptycho_stream.settings import BlueskySettings
from ptycho_stream.wire import PatientDecoder, WireLimits
from ptycho_stream.wire.bluesky import MAX_RUNS, QUIET_NS, BlueskyDecoder
from ptycho_stream.wire.bluesky_encoder import BlueskyEncoder

Y, X = "samy", "samx"
UM = {Y: "um", X: "um"}


class Bluesky:
    """A decoder with a clock that the test turns."""

    def __init__(self, limits: WireLimits | None = None, **options: Any) -> None:
        self.now_ns = 10 * QUIET_NS
        fields = {"y": Y, "x": X, **options}
        self.decoder = BlueskyDecoder(BlueskySettings(**fields), limits, lambda: self.now_ns)

    def take(self, *messages: list[bytes]) -> list[Message]:
        return [found for parts in messages for found in self.decoder.receive(parts)]

    def quiet(self) -> list[Message]:
        self.now_ns += QUIET_NS
        return self.decoder.overdue()


def begun(encoder: BlueskyEncoder, **metadata: Any) -> list[list[bytes]]:
    return [encoder.start(**metadata), encoder.descriptor()]


def where(n: int) -> tuple[float, float]:
    """Position of event ``n`` in the fields' units."""
    return float(n), float(-2 * n)


def event(encoder: BlueskyEncoder, n: int, **more: float) -> list[bytes]:
    y, x = where(n)
    return encoder.event(n, {Y: y, X: x, **more})


def page(encoder: BlueskyEncoder, numbers: Sequence[int]) -> list[bytes]:
    data = {Y: [where(n)[0] for n in numbers], X: [where(n)[1] for n in numbers]}
    return encoder.event_page(numbers, data)


def found(messages: list[Message]) -> dict[int, tuple[float, ...]]:
    """The last position of each frame."""
    return {
        number: tuple(yx)
        for message in messages
        if isinstance(message, Positions)
        for number, yx in zip(message.numbers.tolist(), message.position_yx_m.tolist(), strict=True)
    }


def expected(events: Sequence[int], scale: float = 1e-6) -> dict[int, tuple[float, ...]]:
    return {n - 1: tuple(value * scale for value in where(n)) for n in events}


def problems(messages: list[Message]) -> list[Undecodable]:
    return [message for message in messages if isinstance(message, Undecodable)]


def document(name: str, held: Any, prefix: bytes = b"") -> list[bytes]:
    return [b" ".join([prefix, name.encode(), json.dumps(held).encode()])]


# ---- a run that goes well ----------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
@pytest.mark.parametrize("pages", [True, False])
def test_a_run_gives_its_positions_and_what_it_says_of_itself(serializer, pages):
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM, "run 1", serializer)
    told = {"scan_id": 42, "sample": "star", "operator": "me", "shape": [3, 4], "motors": [Y, X]}
    start, *out = bluesky.take(*begun(encoder, **told))
    assert not out
    assert isinstance(start, PositionsStart)
    assert (start.epoch, start.series, start.joined) == ("run 1", None, False)
    metadata = dict(start.metadata)
    assert metadata.pop("run_time_s") > 0
    assert metadata == {
        "run_uid": "run 1",
        "scan_number": 42,
        "sample": "star",
        "operator": "me",
        "scan_shape": [3, 4],
        "motors": [Y, X],
    }
    numbers = range(1, 13)
    messages = [page(encoder, numbers)] if pages else [event(encoder, n) for n in numbers]
    out = bluesky.take(*messages, encoder.stop())
    assert found(out) == expected(numbers)
    assert out[-1] == PositionsEnd("run 1")
    assert not problems(out)


@pytest.mark.parametrize(
    ("units", "metres"),
    [("m", 1.0), ("mm", 1e-3), ("Microns", 1e-6), (" µm ", 1e-6), ("nm", 1e-9), ("pm", 1e-12)],
)
def test_units_of_the_descriptor_become_metres(units, metres):
    encoder = BlueskyEncoder({Y: units, X: units})
    out = Bluesky().take(*begun(encoder), event(encoder, 3))
    assert found(out)[2] == (3 * metres, -6 * metres)


@pytest.mark.parametrize(("units", "said"), [(None, "no units"), ("deg", "units 'deg'")])
def test_without_units_of_length_the_scale_has_to_be_set(units, said):
    encoder = BlueskyEncoder({Y: units, X: "um"})
    out = Bluesky().take(*begun(encoder), event(encoder, 1))
    assert not found(out)
    assert all(p.reason == "malformed" and said in p.detail for p in problems(out))
    assert "set positions.bluesky.scale_yx_m" in problems(out)[0].detail
    out = Bluesky(scale_yx_m=(1e-3, -1e-3)).take(*begun(encoder), event(encoder, 1))
    assert found(out) == {0: (1e-3, 2e-3)}


def test_each_of_an_events_frames_has_its_position():
    encoder = BlueskyEncoder(UM)
    out = Bluesky(frames_per_event=3).take(*begun(encoder), event(encoder, 2))
    assert found(out) == dict.fromkeys((3, 4, 5), (2e-6, -4e-6))


def test_the_detectors_own_number_counts_where_a_field_has_it():
    """A step that was repeated after a pause has taken one frame more than there are events."""
    encoder = BlueskyEncoder({**UM, "counter": None})
    bluesky = Bluesky(frame="counter", first_frame=1)
    out = bluesky.take(*begun(encoder), event(encoder, 1, counter=1), event(encoder, 2, counter=3))
    assert found(out) == {0: (1e-6, -2e-6), 2: (2e-6, -4e-6)}
    for wrong in (2.5, float("nan")):
        (bad,) = bluesky.take(event(encoder, 3, counter=wrong))
        assert "positions.bluesky.frame" in bad.detail
    assert bluesky.take(event(encoder, 3, counter=-5))[0].reason == "limit"


def test_a_beam_monitor_comes_with_the_positions():
    encoder = BlueskyEncoder({**UM, "ion": None})
    _, message = Bluesky(i0="ion").take(*begun(encoder), event(encoder, 1, ion=5.0))
    assert message.i0.tolist() == [5.0]


def numpy_as_msgpack_numpy(value: Any) -> Any:
    """What the package msgpack-numpy makes of arrays and scalars."""
    if isinstance(value, np.ndarray):
        return {
            b"nd": True,
            b"type": value.dtype.str,
            b"kind": b"",
            b"shape": value.shape,
            b"data": value.tobytes(),
        }
    return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}


def test_numpy_values_are_read_as_msgpack_numpy_writes_them():
    encoder, bluesky = BlueskyEncoder(UM), Bluesky()
    bluesky.take(*begun(encoder))
    (parts,) = event(encoder, 1)
    held = msgpack.unpackb(parts.split(b" ", 2)[2])
    held["data"] = {Y: np.float64(1.0), X: np.float32(-2.0)}
    text = msgpack.packb(held, default=numpy_as_msgpack_numpy)
    assert found(bluesky.take([b" event " + text])) == expected([1])
    (parts,) = page(encoder, [2, 3])
    held = msgpack.unpackb(parts.split(b" ", 2)[2])
    held["data"] = {Y: np.array([2.0, 3.0]), X: np.array([-4, -6], ">i2")}
    held["seq_num"] = np.array([2, 3])
    text = msgpack.packb(held, default=numpy_as_msgpack_numpy)
    assert found(bluesky.take([b" event_page " + text])) == expected([2, 3])


# ---- which run, which stream -------------------------------------------------------------------


def test_other_streams_and_other_runs_leave_no_trace():
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM)
    baseline = BlueskyEncoder(UM, encoder.uid)
    start, descriptor = begun(encoder)
    out = bluesky.take(start, baseline.descriptor("baseline"), event(baseline, 1), descriptor)
    assert [type(m) for m in out] == [PositionsStart]
    out = bluesky.take(event(encoder, 1), event(baseline, 2), encoder.stop())
    assert found(out) == expected([1])
    assert bluesky.take(document("resource", {}), document("stream_datum", {})) == []


def test_a_stream_without_the_fields_says_which_it_has():
    encoder = BlueskyEncoder({"th": "deg", "det": None})
    (bad,) = Bluesky().take(*begun(encoder))
    assert "has no field 'samy', only 'th', 'det'" in bad.detail
    assert "positions.bluesky.only" in bad.detail


def test_only_runs_that_are_asked_for_are_taken():
    bluesky = Bluesky(only={"plan_name": ("grid_scan", "fly")})
    align, scan = BlueskyEncoder(UM), BlueskyEncoder(UM, "scan")
    assert bluesky.take(*begun(align, plan_name="rel_scan"), event(align, 1), align.stop()) == []
    out = bluesky.take(*begun(scan, plan_name="grid_scan"), event(scan, 1), scan.stop())
    assert found(out) == expected([1])
    listed = BlueskyEncoder(UM)
    assert bluesky.take(*begun(listed, plan_name=["fly"]))
    unheard = BlueskyEncoder(UM)
    (bad,) = bluesky.take(unheard.descriptor())
    assert "the start of run" in bad.detail


def test_a_run_may_name_the_detectors_series():
    bluesky, encoder = Bluesky(series_key="series"), BlueskyEncoder(UM)
    (start,) = bluesky.take(*begun(encoder, series=7))
    assert start.series == "7"
    (message,) = bluesky.take(event(encoder, 1))
    assert message.series == "7"
    (bad,) = bluesky.take(*begun(BlueskyEncoder(UM)))
    assert "has no 'series'" in bad.detail


def test_documents_of_another_prefix_are_anothers():
    encoder, other = BlueskyEncoder(UM, prefix="nano"), BlueskyEncoder(UM, prefix="tomo")
    bluesky = Bluesky(prefix="nano")
    out = bluesky.take(*begun(encoder), *begun(other), event(encoder, 1), event(other, 2))
    assert found(out) == expected([1])


# ---- documents that are lost, doubled, late ----------------------------------------------------


def test_lost_events_cost_their_own_frames_and_the_end_waits_for_late_ones():
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM, "run")
    events = [event(encoder, n) for n in range(1, 6)]
    order = [events[0], events[3], events[3], events[4], encoder.stop()]
    out = bluesky.take(*begun(encoder), *order)
    assert found(out) == expected([1, 4, 5])
    assert not [m for m in out if isinstance(m, PositionsEnd)]
    assert found(bluesky.take(events[2])) == expected([3])
    assert bluesky.quiet() == [PositionsEnd("run")]
    assert bluesky.quiet() == []


def test_the_last_late_event_ends_the_run():
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM, "run")
    events = [event(encoder, n) for n in range(1, 4)]
    bluesky.take(*begun(encoder), *events[:2], encoder.stop())
    assert bluesky.take(events[2])[-1] == PositionsEnd("run")


def test_doubled_documents_change_nothing():
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM, "run")
    start, descriptor, first = *begun(encoder), event(encoder, 1)
    stop = encoder.stop()
    out = bluesky.take(start, start, descriptor, descriptor, start, first, first, descriptor, stop)
    assert [type(m) for m in out] == [PositionsStart, Positions, Positions, PositionsEnd]


def test_a_start_that_its_descriptor_has_overtaken_still_tells_the_metadata():
    bluesky, encoder = Bluesky(), BlueskyEncoder(UM, "run")
    start, descriptor = begun(encoder, sample="star")
    (first, again) = bluesky.take(descriptor, start)
    assert (first.metadata, again.epoch) == ({"run_uid": "run"}, "run")
    assert again.metadata["sample"] == "star"


def test_without_its_descriptor_a_run_needs_the_scale():
    encoder = BlueskyEncoder(UM, "run")
    start, descriptor = begun(encoder, sample="star")
    bluesky = Bluesky()
    events = [event(encoder, 1), event(encoder, 2)]
    (bad,) = bluesky.take(start, *events)
    assert "descriptor" in bad.detail and "set positions.bluesky.scale_yx_m" in bad.detail
    bluesky = Bluesky(scale_yx_m=(1e-6, 1e-6), only={"sample": ("star",)})
    out = bluesky.take(start, events[0], descriptor, events[1], encoder.stop())
    assert found(out) == expected([1, 2])
    assert (out[0].epoch, out[0].metadata["sample"]) == ("run", "star")
    assert [type(m) for m in out].count(PositionsStart) == 1
    assert out[-1] == PositionsEnd("run")


@pytest.mark.parametrize(("first", "joined"), [(1, False), (5, True)])
def test_a_run_that_is_joined_needs_the_scale_and_nothing_that_only_its_start_tells(first, joined):
    encoder = BlueskyEncoder(UM)
    events = [event(encoder, n) for n in range(first, 9)]
    bluesky = Bluesky(scale_yx_m=(1e-6, 1e-6))
    out = bluesky.take(*events)
    assert isinstance(out[0], PositionsStart) and out[0].joined == joined
    assert found(out) == expected(range(first, 9))
    assert not bluesky.take(document("event", {"descriptor": "o", "seq_num": 1, "data": {}}))
    encoder._events = 8  # the encoder counts what it was asked for
    assert bluesky.take(encoder.stop()) == [PositionsEnd(out[0].epoch)]
    for options in ({"only": {"a": (1,)}}, {"series_key": "series"}):
        (bad,) = Bluesky(scale_yx_m=(1e-6, 1e-6), **options).take(*events)
        assert "can be joined only without" in bad.detail


def test_events_that_overtake_start_and_descriptor_get_their_metadata():
    bluesky, encoder = Bluesky(scale_yx_m=(1e-6, 1e-6)), BlueskyEncoder(UM)
    start, descriptor = begun(encoder, sample="star")
    joined, _, again, _ = bluesky.take(event(encoder, 1), start, descriptor, event(encoder, 2))
    assert (again.epoch, again.metadata["sample"]) == (joined.epoch, "star")


def test_a_run_that_begins_ends_one_whose_end_was_lost():
    bluesky, encoder = Bluesky(scale_yx_m=(1e-6, 1e-6)), BlueskyEncoder(UM, "next")
    bluesky.take(event(BlueskyEncoder(UM), 5))
    start, _ = begun(encoder)
    out = bluesky.take(start, event(encoder, 1))
    assert (out[0].epoch, out[0].joined, found(out)) == ("next", False, expected([1]))


def test_of_very_many_runs_the_oldest_are_forgotten():
    bluesky = Bluesky()
    for n in range(3 * MAX_RUNS):
        bluesky.take(*begun(BlueskyEncoder(UM, f"run {n}")))
    held = (bluesky.decoder._runs, bluesky.decoder._streams, bluesky.decoder._heard)
    assert all(len(known) == MAX_RUNS for known in held)


# ---- what is refused ---------------------------------------------------------------------------


class Explosive:
    """Loading its pickle would be seen."""

    loaded: ClassVar[list[int]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Explosive.loaded.append, (1,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", ["start", "event", "stop"])
def test_pickle_is_refused_with_what_to_do_instead(protocol, name):
    for held in ({"uid": "a", "time": 1.0}, Explosive(), {"a": Explosive()}):
        text = pickle.dumps(held, protocol)
        (bad,) = Bluesky().take([b" ".join([b"", name.encode(), text])])
        assert bad.reason == "malformed"
        if not isinstance(held, Explosive) or protocol > 1:
            assert "publish with a safe serializer" in bad.detail
            assert "serializer=msgpack.packb" in bad.detail
    assert Explosive.loaded == []


def replaced(held: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    return {**held, key: value}


START = {"uid": "run", "time": 1.0}
DESCRIPTOR = {
    "uid": "d",
    "run_start": "run",
    "name": "primary",
    "data_keys": {Y: {"units": "um"}, X: {"units": "um"}},
}
EVENT = {"descriptor": "d", "seq_num": 1, "data": {Y: 1.0, X: 2.0}}
STOP = {"run_start": "run", "num_events": {"primary": 2}}


@pytest.mark.parametrize(
    ("parts", "reason", "said"),
    [
        ([b""], "malformed", "without prefix, name and document"),
        ([b"start {}"], "malformed", "without prefix, name and document"),
        ([b"a", b"b"], "torn", "one part"),
        (document("verse", {}), "malformed", "no name of a Bluesky document"),
        ([b" start {"], "malformed", "not a Bluesky document"),
        ([b" start \xc1"], "malformed", "not a Bluesky document"),
        ([b" start " + b"[" * 100_000], "malformed", "not a Bluesky document"),
        ([b' start {"a":' + b"[" * 100_000], "malformed", "not a Bluesky document"),
        (document("start", {}), "malformed", "no uid"),
        (document("start", {"uid": "a\nb"}), "malformed", "printable"),
        (document("event", replaced(EVENT, "seq_num", -1)), "limit", "outside 0"),
        (document("event", replaced(EVENT, "seq_num", 2**60)), "limit", "outside 0"),
        (document("event", replaced(EVENT, "seq_num", "1")), "malformed", "not a Bluesky"),
        (document("event", replaced(EVENT, "data", {Y: "a", X: 1})), "malformed", "no single"),
        (document("event", replaced(EVENT, "data", {Y: [1, 2], X: 1})), "malformed", "no single"),
        (document("event", replaced(EVENT, "data", {Y: 1.0})), "malformed", "lacks its field"),
        (document("event_page", replaced(EVENT, "seq_num", [1, 2])), "malformed", "list"),
        (document("stop", {}), "malformed", "not a Bluesky document"),
    ],
)
def test_what_is_no_document_is_said_and_costs_nothing_else(parts, reason, said):
    bluesky = Bluesky()
    out = bluesky.take(document("start", START), document("descriptor", DESCRIPTOR))
    out += bluesky.take(document("event", EVENT), parts)
    out += bluesky.take(document("event", replaced(EVENT, "seq_num", 2)), document("stop", STOP))
    (bad,) = problems(out)
    assert bad.reason == reason
    assert said in bad.detail
    assert found(out) == {0: (1e-6, 2e-6), 1: (1e-6, 2e-6)}
    assert out[-1] == PositionsEnd("run")


def test_seq_num_zero_is_no_event():
    bluesky = Bluesky()
    bluesky.take(document("start", START), document("descriptor", DESCRIPTOR))
    (bad,) = bluesky.take(document("event", replaced(EVENT, "seq_num", 0)))
    assert bad.reason == "limit"


def test_documents_are_bounded_before_anything_is_made_of_them():
    bluesky = Bluesky(WireLimits(max_positions=100, max_header_bytes=2000), frames_per_event=2)
    encoder = BlueskyEncoder(UM)
    bluesky.take(*begun(encoder))
    for parts in (
        page(encoder, range(1, 102)),
        page(encoder, range(1, 52)),
        encoder.start(note="n" * 10_000),
        document("event", replaced(EVENT, "more", "n" * 10_000)),
    ):
        (bad,) = bluesky.take(parts)
        assert bad.reason == "limit"
    assert len(found(bluesky.take(page(encoder, range(1, 51))))) == 100


@settings(max_examples=200)
@given(
    st.sampled_from([b" start ", b" descriptor ", b" event ", b" event_page ", b" stop ", b""]),
    st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)),
)
def test_no_bytes_raise(name, part):
    bluesky = Bluesky(scale_yx_m=(1.0, 1.0))
    bluesky.take([name + part], [name + b"{" + part])
    bluesky.quiet()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=200)
@given(
    held=st.sampled_from([("start", START), ("descriptor", DESCRIPTOR), ("event", EVENT)])
    | st.sampled_from([("event_page", EVENT), ("stop", STOP)]),
    data=st.data(),
    as_json=st.booleans(),
)
def test_no_value_of_any_key_raises(held, data, as_json):
    name, plain = held
    key = data.draw(st.sampled_from([*plain, Y, X]))
    value = data.draw(VALUES)
    if key in (Y, X):
        key, value = "data", {Y: 1.0, X: 2.0, key: value}
    changed = replaced(plain, key, value)
    packed = json.dumps(changed).encode() if as_json else msgpack.packb(changed)
    bluesky = Bluesky()
    bluesky.take(document("start", START), document("descriptor", DESCRIPTOR))
    bluesky.take([b" ".join([b"", name.encode(), packed])])
    bluesky.take(document("event", EVENT), document("stop", STOP))
    bluesky.quiet()


def test_the_decoder_waits_for_what_is_overdue():
    assert isinstance(Bluesky().decoder, PatientDecoder)
