"""What is published is what is read; what is damaged is refused, and nothing else ever happens."""

import contextlib
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_source import SCANS, grown

from ptycho_stream.errors import LimitExceeded, MalformedMessage, WireError
from ptycho_stream.wire import control, results
from ptycho_stream.wire.follower import Follower


def update_of(content, **changes):
    fields = {
        "epoch": "e",
        "seq": 1,
        "content": content,
        "frames_from": 0,
        "frames_total": content.frame_numbers.size,
        "probe_version": 1,
        "fresh": True,
        "more": False,
        "sent_ns": 5,
    }
    return results.ImageUpdate(**{**fields, **changes})


def as_sent(update):
    return [bytes(part) for part in results.encode_image(update)]


@settings(max_examples=40, deadline=None)
@given(
    step=st.integers(0, 12),
    seq=st.integers(0, 2**62),
    tiles=st.integers(1, 5),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    probe=st.none() | st.tuples(st.integers(1, 3), st.integers(1, 9)),
    trust=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3),
)
def test_an_update_is_read_back_as_it_was_sent(step, seq, tiles, flags, probe, trust):
    fresh, more, final = flags
    shape = (0, 0, 0) if probe is None else (probe[0], probe[1], probe[1])
    content = grown(step, tiles=tiles, tile_px=8, final=final, trust=trust)
    content = replace(content, probe=np.full(shape, 1 + 2j, np.complex64))
    content = replace(content, spread=seq * 1e-9 if more else None, collapsed=fresh)
    sent = update_of(content, seq=seq, fresh=fresh, more=more, reply_to=seq)
    read = results.decode_server_message(as_sent(sent))
    assert (read.epoch, read.seq, read.fresh, read.more, read.reply_to) == (
        *("e", seq, fresh, more),
        seq,
    )
    assert (read.content.spread, read.content.collapsed) == (content.spread, content.collapsed)
    assert read.content.tiles.keys() == content.tiles.keys()
    for key, tile in content.tiles.items():
        got = read.content.tiles[key]
        assert got.version == tile.version
        assert np.array_equal(got.object_yx, tile.object_yx)
        assert np.array_equal(got.weight_yx, tile.weight_yx)
        assert not got.object_yx.flags.writeable
    assert np.array_equal(read.content.frame_numbers, content.frame_numbers)
    assert np.array_equal(read.content.position_yx_m, content.position_yx_m)
    assert np.array_equal(read.content.probe, content.probe)
    assert (read.content.final, dict(read.content.trust)) == (final, trust)


def test_arrays_of_other_layouts_are_sent_in_the_order_that_the_protocol_says():
    content = grown(1, tile_px=4)
    (key, tile), *_ = content.tiles.items()
    turned = np.arange(16, dtype=np.complex128).reshape(4, 4).T
    content = replace(content, tiles={key: replace(tile, object_yx=turned)})
    read = results.decode_server_message(as_sent(update_of(content)))
    assert np.array_equal(read.content.tiles[key].object_yx, turned)


def changed_header(**changes):
    parts = as_sent(update_of(grown(3, tile_px=8)))
    header = msgspec.msgpack.decode(parts[0])
    return [msgspec.msgpack.encode({**header, **changes}), *parts[1:]]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tile_px": 10**9}, LimitExceeded),
        ({"tile_px": 0}, LimitExceeded),
        ({"frames": 2**40}, LimitExceeded),
        ({"frames": -1}, LimitExceeded),
        ({"frames_from": -1}, LimitExceeded),
        ({"probe_shape": [2**31, 2**31, 2**31]}, LimitExceeded),
        ({"probe_shape": [1, 0, 0]}, LimitExceeded),
        ({"tiles": [[0, 0, 1]] * 1000}, MalformedMessage),
        ({"tile_px": 16}, MalformedMessage),
        ({"v": 2}, MalformedMessage),
        ({"type": "other"}, MalformedMessage),
        ({"pixel_yx_m": [1.0]}, MalformedMessage),
        ({"seq": "1"}, MalformedMessage),
        ({"counts": {"a": "b"}}, MalformedMessage),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_allocated(changes, error):
    with pytest.raises(error):
        results.decode_server_message(changed_header(**changes))


def test_an_unknown_key_is_ignored_so_that_newer_senders_are_understood():
    assert results.decode_server_message(changed_header(invention=1)).seq == 1


def mutated(data, rng):
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place = rng.randrange(len(data))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randint(1, 8)]
            case _:
                data[place:place] = rng.randbytes(rng.randint(1, 4))
    return bytes(data)


def test_damaged_messages_are_refused_or_understood_and_never_more():
    rng = random.Random(3)
    update = as_sent(update_of(grown(3, tile_px=8)))
    others = [
        results.encode(
            results.Beacon(epoch="e", images=[results.ImageMark(SCANS[0], 1, 5)], sent_ns=1)
        ),
        results.encode(results.Refusal(reply_to=1, epoch="e", reason="busy", message="m")),
        results.encode(
            results.ScanNotice(epoch="e", scan_id="s", state="x", final=True, sent_ns=1, counts={})
        ),
    ]
    request = results.encode(results.ResyncRequest(id=1, epoch="e", tiles=[(1, 2, 3)]))[0]
    command = control.encode_request(1, "scans", {"limit": 3})
    follower = Follower()
    for _ in range(8000):
        parts = [bytes(part) for part in rng.choice([update, *others])]
        place = rng.randrange(len(parts))
        parts[place] = mutated(parts[place], rng)
        follower.receive(parts)  # counts what it cannot read
        for decode, data in (
            (lambda data: results.decode_resync([data]), request),
            (control.decode_request, command),
            (control.decode_reply, command),
        ):
            with contextlib.suppress(WireError, control.ControlError):
                decode(mutated(data, rng))
    assert follower.undecodable > 1000
    follower.take()


def test_deep_nesting_is_refused():
    with pytest.raises(MalformedMessage):
        results.decode_server_message([b"\x81\xa8metadata" + b"\x91" * 100_000])


def test_text_that_is_not_utf_8_is_refused():
    request = results.encode(results.ResyncRequest(id=1, epoch="e"))[0]
    with pytest.raises(MalformedMessage):
        results.decode_resync([request.replace(b"\xa5epoch\xa1e", b"\xa5epoch\xa1\xff")])
    command = control.encode_request("x", "status", {})
    with pytest.raises(MalformedMessage):
        control.decode_request(command.replace(b"\xa6status", b"\xa6st\xfftus"))
