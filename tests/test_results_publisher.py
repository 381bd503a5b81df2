"""The publisher sends only what is new, never waits, and answers whoever missed something."""

import time
from dataclasses import replace

import msgspec
import numpy as np
import pytest
import zmq
from results_source import SCANS, free_settings, grown

from ptycho_stream.errors import EndpointError
from ptycho_stream.wire import results as wire
from ptycho_streamd.publish import MAX_SUBSCRIPTION_BYTES, MAX_SUBSCRIPTIONS, Publisher
from ptycho_streamd.reconstruct import is_due
from ptycho_streamd.security import Gate


@pytest.fixture
def context():
    with zmq.Context() as context:
        yield context


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.close()


@pytest.fixture
def publisher(gate):
    publisher = Publisher(gate, free_settings(), "epoch")
    yield publisher
    publisher.close()


@pytest.fixture
def subscriber(context, publisher):
    with context.socket(zmq.SUB) as socket:
        socket.subscribe(b"")
        socket.connect(publisher.sockets[0].last_endpoint.decode())
        serve_until(publisher, lambda: publisher.subscribers == 1)
        yield socket


@pytest.fixture
def asker(context, publisher):
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(publisher.sockets[1].last_endpoint.decode())
        yield socket


def serve_until(publisher, condition, timeout_s=5):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        publisher.serve()
        time.sleep(0.002)


def messages(subscriber, kind, timeout_ms=300):
    found = []
    while subscriber.poll(timeout_ms):
        topic, *parts = subscriber.recv_multipart()
        message = wire.decode_server_message(parts)
        if isinstance(message, kind):
            found.append((topic, message))
    return found


def ask(publisher, asker, request):
    asker.send_multipart([request] if isinstance(request, bytes) else wire.encode(request))
    serve_until(publisher, lambda: asker.poll(1))
    return wire.decode_server_message(asker.recv_multipart())


@pytest.mark.parametrize(
    ("wait_ms", "batch_ms", "due"),
    [(0, 0, True), (1, 0, False), (30, 70, True), (40, 70, False), (-5, 0, True), (-5, 70, True)],
)
def test_an_image_leaves_at_the_moment_nearest_to_the_interval(wait_ms, batch_ms, due):
    assert is_due(wait_ms * 1e-3, batch_ms * 1e-3) is due


def test_the_first_update_holds_all_and_the_next_only_what_is_new(publisher, subscriber):
    first = publisher.publish(grown(5))
    second = publisher.publish(grown(6))
    (topic, one), (_, two) = messages(subscriber, wire.ImageUpdate)
    assert topic == b"image/" + SCANS[0].encode()
    assert one.fresh and len(one.content.tiles) == 4 and one.content.frame_numbers.size == 5
    assert not two.fresh and list(two.content.tiles) == [(-1, -1)]
    assert two.content.frame_numbers.tolist() == [5] and two.frames_from == 5
    assert two.content.probe.size == 0
    assert two.seq == one.seq + 1
    assert (first.tiles, first.frames, second.tiles, second.frames) == (4, 5, 1, 1)


def test_nothing_new_sends_nothing(publisher, subscriber):
    image = grown(3)
    publisher.publish(image)
    assert publisher.publish(image).messages == 0
    assert publisher.publish(grown(3)).messages == 0
    assert len(messages(subscriber, wire.ImageUpdate)) == 1


def test_a_change_of_state_alone_is_published_and_noticed(publisher, subscriber):
    publisher.publish(grown(3))
    publisher.publish(grown(3, state="complete", final=True))
    received = []
    while subscriber.poll(300):
        received.append(wire.decode_server_message(subscriber.recv_multipart()[1:]))
    updates = [m for m in received if isinstance(m, wire.ImageUpdate)]
    notices = [m for m in received if isinstance(m, wire.ScanNotice)]
    assert [u.content.state for u in updates] == ["running", "complete"]
    assert not updates[1].content.tiles and updates[1].content.final
    assert [n.state for n in notices] == ["running", "complete"]


def test_a_long_update_is_cut_into_messages_of_bounded_size(publisher, subscriber):
    publisher.publish(grown(40, tile_px=256, tiles=20))
    updates = [m for _, m in messages(subscriber, wire.ImageUpdate)]
    assert len(updates) > 1
    assert [u.more for u in updates] == [True] * (len(updates) - 1) + [False]
    for update in updates:
        size = sum(tile.size_bytes for tile in update.content.tiles.values())
        assert size <= wire.MAX_UPDATE_BYTES
    assert sum(len(u.content.tiles) for u in updates) == 20
    assert sum(u.content.frame_numbers.size for u in updates) == 40


def test_images_of_two_scans_grow_side_by_side(publisher, subscriber):
    for step in (2, 3):
        publisher.publish(grown(step, SCANS[0], state="draining"))
        publisher.publish(grown(step, SCANS[1]))
    updates = [m for _, m in messages(subscriber, wire.ImageUpdate)]
    for scan_id in SCANS[:2]:
        of_scan = [u for u in updates if u.content.scan_id == scan_id]
        assert [u.fresh for u in of_scan] == [True, False]
        assert of_scan[1].seq == of_scan[0].seq + 1
        assert len(of_scan[1].content.tiles) == 1


def test_the_beacon_tells_each_second_how_far_images_have_come(publisher, subscriber):
    publisher.publish(grown(2))
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        publisher.serve()
        time.sleep(0.01)
    beacons = [m for _, m in messages(subscriber, wire.Beacon)]
    assert len(beacons) >= 3
    (mark,) = beacons[-1].images
    assert (mark.scan_id, mark.generation, mark.seq) == (SCANS[0], 1, 1)
    assert beacons[-1].epoch == publisher.epoch


def test_resync_gives_a_newcomer_all_and_others_the_newer_tiles(publisher, asker):
    publisher.publish(grown(5))
    everything = ask(publisher, asker, wire.ResyncRequest(id=1))
    assert everything.reply_to == 1 and len(everything.content.tiles) == 4
    publisher.publish(grown(6))
    time.sleep(wire.MIN_RESYNC_INTERVAL_S)
    has = [(ty, tx, t.version) for (ty, tx), t in everything.content.tiles.items()]
    request = wire.ResyncRequest(
        id=2,
        epoch=everything.epoch,
        scan_id=SCANS[0],
        generation=1,
        frames=5,
        probe_version=everything.probe_version,
        tiles=has,
    )
    newer = ask(publisher, asker, request)
    assert list(newer.content.tiles) == [(-1, -1)]
    assert newer.content.frame_numbers.tolist() == [5]
    assert newer.content.probe.size == 0
    assert newer.seq == 2


@pytest.mark.parametrize("stale", ["epoch", "scan_id", "generation"])
def test_resync_with_nothing_in_common_gives_all(publisher, asker, stale):
    publisher.publish(grown(3))
    has = {"epoch": publisher.epoch, "scan_id": SCANS[0], "generation": 1}
    has[stale] = 9 if stale == "generation" else "other"
    request = wire.ResyncRequest(id=1, frames=3, tiles=[(-1, -2, 99)], probe_version=1, **has)
    reply = ask(publisher, asker, request)
    assert len(reply.content.tiles) == 3
    assert reply.frames_from == 0 and reply.content.frame_numbers.size == 3
    assert reply.content.probe.shape == (2, 8, 8)


def test_resync_is_refused_with_a_reason(publisher, asker):
    assert ask(publisher, asker, wire.ResyncRequest(id=1)).reason == "empty"
    publisher.publish(grown(3))
    assert ask(publisher, asker, wire.ResyncRequest(id=2)).reason == "busy"
    time.sleep(wire.MIN_RESYNC_INTERVAL_S)
    refusal = ask(publisher, asker, wire.ResyncRequest(id=3, wanted_scan_id=SCANS[5]))
    assert (refusal.reason, refusal.newest_scan_id) == ("unknown_scan", SCANS[0])
    assert ask(publisher, asker, b"\xc1 not msgpack").reason == "bad_request"
    wrong_version = msgspec.msgpack.encode({"type": "resync", "id": 1, "v": 99})
    assert ask(publisher, asker, wrong_version).reason == "bad_request"


def test_images_of_scans_before_stay_within_reach_up_to_a_limit(publisher, asker):
    for scan_id in SCANS[:10]:
        publisher.publish(grown(2, scan_id, state="complete", final=True))
    reply = ask(publisher, asker, wire.ResyncRequest(id=1, wanted_scan_id=SCANS[8]))
    assert reply.content.scan_id == SCANS[8] and reply.content.final
    time.sleep(wire.MIN_RESYNC_INTERVAL_S)
    refusal = ask(publisher, asker, wire.ResyncRequest(id=2, wanted_scan_id=SCANS[0]))
    assert refusal.reason == "unknown_scan"


def test_a_new_generation_starts_the_image_anew(publisher, subscriber):
    publisher.publish(grown(4))
    publisher.publish(grown(4, generation=2))
    one, two = (m for _, m in messages(subscriber, wire.ImageUpdate))
    assert two.fresh and len(two.content.tiles) == 4 and two.seq == one.seq + 1
    assert two.content.probe.shape == (2, 8, 8)


def test_an_image_that_shrinks_starts_a_new_epoch(publisher):
    publisher.publish(grown(4))
    epoch = publisher.epoch
    publisher.publish(grown(2))
    assert publisher.epoch != epoch


def test_a_port_in_use_is_an_error_that_names_the_setting(gate, publisher):
    taken = publisher.sockets[0].last_endpoint.decode()
    settings = replace_endpoint(free_settings(), endpoint=taken)
    with pytest.raises(EndpointError, match=r"results\.endpoint.*in use"):
        Publisher(gate, settings, "epoch")
    taken = publisher.sockets[1].last_endpoint.decode()
    settings = replace_endpoint(free_settings(), resync_endpoint=taken)
    with pytest.raises(EndpointError, match=r"results\.resync_endpoint.*in use"):
        Publisher(gate, settings, "epoch")


def replace_endpoint(settings, **changes):
    return settings.model_copy(update=changes)


def test_a_peer_that_subscribes_to_everything_there_is_is_shown_out(context, publisher):
    """Each subscription stays in libzmq's memory: a client has use for a few."""
    with context.socket(zmq.SUB) as flood, context.socket(zmq.SUB) as long:
        monitor = flood.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        for socket in (flood, long):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            socket.connect(publisher.sockets[0].last_endpoint.decode())
        watched = long.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        long.subscribe(b"x" * (MAX_SUBSCRIPTION_BYTES + 1))
        for number in range(MAX_SUBSCRIPTIONS + 100):
            flood.subscribe(b"image/%d" % number)
        serve_until(publisher, lambda: monitor.poll(0) and watched.poll(0))
        for socket, events in ((flood, monitor), (long, watched)):
            socket.disable_monitor()
            events.close()


def test_metadata_may_hold_numpy_values(publisher, subscriber):
    image = replace(grown(1), metadata={"dose": np.float32(0.5), "shape": np.array([1, 2])})
    publisher.publish(image)
    ((_, update),) = messages(subscriber, wire.ImageUpdate)
    assert update.content.metadata == {"dose": 0.5, "shape": [1, 2]}
