"""Subscribers always converge to the newest image: late, slow, cut off, or after a restart."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import zmq
from results_source import SCANS, Source, free_ports, free_settings, grown, same_picture

from ptycho_stream import client, remote
from ptycho_stream.client import AsyncResultStream, ResultStream
from ptycho_stream.errors import EndpointError, MissingPackage, ScanNotFound
from ptycho_stream.settings import ControlSettings, ResultSettings


def images_until(results, condition, timeout_s=10):
    end = time.monotonic() + timeout_s
    for image in results:
        if condition(image):
            return image
        assert time.monotonic() < end, image
    return None


def test_endpoints_default_to_those_of_the_settings():
    assert ResultSettings().endpoint == client.RESULTS_ENDPOINT
    assert ResultSettings().resync_endpoint == client.RESYNC_ENDPOINT
    assert ControlSettings().endpoint == remote.CONTROL_ENDPOINT


def test_a_subscriber_sees_the_image_grow():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        for step in range(1, 8):
            source.publish(grown(step))
            image = images_until(results, lambda i, n=step: i.frame_numbers.size == n)
            assert same_picture(image, grown(step))
        assert image.metadata == {"sample": "siemens star", "proposal": 7}
        assert image.counts["committed"] == 7


def test_a_stream_knows_which_images_the_daemon_holds():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        assert results.held == {}
        source.publish(grown(2, SCANS[1]))
        source.publish(grown(3, SCANS[0], generation=4))
        end = time.monotonic() + 5
        while len(results.held) < 2 and time.monotonic() < end:
            results.latest()
            results._turn(time.monotonic() + 0.1)
        assert list(results.held) == [SCANS[0], SCANS[1]]
        assert results.held[SCANS[0]][0] == 4


def test_a_late_joiner_gets_the_whole_image_at_once():
    with Source() as source:
        for step in range(1, 30):
            source.publish(grown(step))
        with ResultStream(*source.endpoints, timeout_s=5) as results:
            assert same_picture(results.latest(timeout_s=5), grown(29))


def test_a_snapshot_of_many_messages_arrives_whole():
    content = grown(60, tile_px=256, tiles=40)  # 31 MB
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(content)
        assert same_picture(results.latest(timeout_s=10), content)


def test_a_lost_update_is_asked_for_when_the_next_one_comes():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(3))
        results.latest()
        source.wait_subscribers()
        source.lose(grown(4))
        source.lose(grown(5))
        source.publish(grown(6))
        image = images_until(results, lambda i: i.settled and i.frame_numbers.size == 6)
        assert same_picture(image, grown(6))


def test_a_lost_last_update_is_asked_for_after_the_beacon():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(3))
        results.latest()
        source.lose(grown(4, state="complete", final=True))
        image = images_until(results, lambda i: i.final)
        assert same_picture(image, grown(4, state="complete", final=True))


def test_nothing_is_asked_twice_where_nothing_is_lost():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(1))
        results.latest()
        source.wait_subscribers()
        asked = source.publisher.resyncs
        for step in range(2, 40):
            source.publish(grown(step))
            images_until(results, lambda i, n=step: i.frame_numbers.size == n)
        source.publish(grown(2, SCANS[1]))
        images_until(results, lambda i: i.scan_id == SCANS[1])
        assert source.publisher.resyncs == asked


def test_a_new_scan_and_a_new_generation_start_a_new_image():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(9))
        images_until(results, lambda i: i.frame_numbers.size == 9)
        second = replace(grown(2, generation=2), probe=np.full((1, 8, 8), 2, np.complex64))
        source.publish(second)
        image = images_until(results, lambda i: i.content.generation == 2)
        assert same_picture(image, second)
        source.publish(grown(1, SCANS[1]))
        image = images_until(results, lambda i: i.scan_id == SCANS[1])
        assert same_picture(image, grown(1, SCANS[1]))


def test_the_older_of_two_open_scans_does_not_disturb_the_newer():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        for step in range(1, 5):
            source.publish(grown(step, SCANS[1]))
            source.publish(grown(step + 3, SCANS[0], state="draining"))
        image = images_until(results, lambda i: i.settled and i.frame_numbers.size == 4)
        assert same_picture(image, grown(4, SCANS[1]))
        source.publish(grown(8, SCANS[0], state="complete", final=True))
        source.publish(grown(5, SCANS[1]))
        assert images_until(results, lambda i: i.frame_numbers.size == 5).scan_id == SCANS[1]
    assert results  # closed without leaving a thread


def test_one_scan_is_followed_to_its_end_though_newer_ones_have_begun():
    with Source() as source:
        source.publish(grown(2, SCANS[0]))
        with ResultStream(*source.endpoints, scan_id=SCANS[0], timeout_s=5) as results:
            assert next(results).scan_id == SCANS[0]
            source.publish(grown(1, SCANS[1]))
            source.publish(grown(3, SCANS[0], state="aborted", final=True))
            source.publish(grown(2, SCANS[1]))
            *_, last = results
            assert last.final and not last.complete and last.state == "aborted"
            assert same_picture(last, grown(3, SCANS[0], state="aborted", final=True))


def test_wait_complete_stays_with_the_scan_that_it_began_with():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(2, SCANS[0]))

        def go_on():
            time.sleep(0.3)
            source.publish(grown(1, SCANS[1]))
            source.publish(grown(4, SCANS[0], state="complete", final=True))
            source.publish(grown(2, SCANS[1]))

        thread = threading.Thread(target=go_on)
        thread.start()
        image = results.wait_complete(timeout_s=10)
        thread.join()
        assert image.complete
        assert same_picture(image, grown(4, SCANS[0], state="complete", final=True))


def test_wait_complete_waits_for_the_first_scan_and_can_pass_over_old_ones():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        publish = threading.Timer(
            0.4, lambda: source.publish(grown(1, SCANS[0], state="complete", final=True))
        )
        publish.start()
        assert results.wait_complete(timeout_s=10).scan_id == SCANS[0]
        publish.join()
        publish = threading.Timer(
            0.4, lambda: source.publish(grown(1, SCANS[1], state="complete", final=True))
        )
        publish.start()
        assert results.wait_complete(timeout_s=10, after=SCANS[0]).scan_id == SCANS[1]
        publish.join()
        # The image of a scan before the newest is within reach too.
        assert results.wait_complete(SCANS[0], timeout_s=10).scan_id == SCANS[0]


def test_wait_complete_says_why_it_gives_up(monkeypatch):
    monkeypatch.setattr("ptycho_stream.wire.follower.GONE_AFTER_S", 1.0)
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        with pytest.raises(EndpointError, match="no image yet"):
            results.wait_complete(timeout_s=0.5)
        source.publish(grown(1, SCANS[3]))
        with pytest.raises(EndpointError, match=r"final image.*newest image is of scan"):
            results.wait_complete(timeout_s=0.5)
        with pytest.raises(ScanNotFound, match="ctl export"):
            results.wait_complete(SCANS[0], timeout_s=10)


def test_a_wait_that_was_given_up_leaves_the_stream_with_the_newest_scan():
    def interrupt(_image):
        raise KeyboardInterrupt

    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        source.publish(grown(2, SCANS[0]))
        with pytest.raises(KeyboardInterrupt):
            results.wait_complete(SCANS[0], on_image=interrupt)
        source.publish(grown(1, SCANS[1]))
        assert images_until(results, lambda image: image.scan_id == SCANS[1])
        with pytest.raises(EndpointError, match="final image"):
            results.wait_complete(timeout_s=0.3)
        source.publish(grown(1, SCANS[2]))
        assert images_until(results, lambda image: image.scan_id == SCANS[2])


def test_silence_is_an_error_that_says_what_to_check():
    settings = free_settings()
    results = ResultStream(settings.endpoint, settings.resync_endpoint, timeout_s=0.3)
    with results, pytest.raises(EndpointError, match=r"is ptycho-streamd running"):
        results.latest()


def test_no_image_yet_is_told_apart_from_silence():
    with Source() as source, ResultStream(*source.endpoints, timeout_s=5) as results:
        assert results.latest() is None


def test_a_subscriber_survives_the_restart_of_the_daemon():
    settings = free_settings()
    with ResultStream(settings.endpoint, settings.resync_endpoint, timeout_s=20) as results:
        with Source(settings) as source:
            for step in range(1, 9):
                source.publish(grown(step))
            images_until(results, lambda i: i.frame_numbers.size == 8)
        # The new process knows less, and its versions start again: a client must not keep the old.
        with Source(settings) as source:
            source.publish(grown(3, state="interrupted", final=True))
            image = images_until(results, lambda i: i.final and i.frame_numbers.size == 3)
            assert same_picture(image, grown(3, state="interrupted", final=True))


@contextlib.contextmanager
def source_process(ports, scan_id):
    command = [sys.executable, str(Path(__file__).with_name("results_source.py"))]
    process = subprocess.Popen(
        [*command, *map(str, ports), scan_id], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_subscriber_survives_kill_9_of_the_publishing_process():
    ports = free_ports(2)
    addresses = [f"tcp://127.0.0.1:{port}" for port in ports]
    with ResultStream(*addresses, timeout_s=30) as results:
        for scan_id in SCANS[:2]:
            with source_process(ports, scan_id) as process:
                image = images_until(
                    results,
                    # An update that came before the rest of the image is in it, but not settled.
                    lambda i, s=scan_id: i.settled and i.scan_id == s and i.frame_numbers.size > 5,
                )
                assert same_picture(image, grown(image.frame_numbers.size, scan_id))
                process.send_signal(signal.SIGKILL)


SLOW_SUBSCRIBER = """
import sys
from ptycho_stream.client import ResultStream
with ResultStream(*sys.argv[1:3], timeout_s=30) as results:
    for image in results:
        print(image.frame_numbers.size, int(image.final), flush=True)
        if image.final:
            break
"""


def test_a_stopped_subscriber_costs_the_daemon_no_time_and_bounded_memory():
    steps, tile_px = 150, 512  # 3 MB an update, 470 MB in all
    settings = free_settings(queue_bytes=32_000_000)
    me = psutil.Process()
    with Source(settings) as source:
        source.publish(grown(1, tile_px=tile_px))
        slow = subprocess.Popen(
            [sys.executable, "-c", SLOW_SUBSCRIBER, *source.endpoints],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        try:
            assert slow.stdout.readline()
            slow.send_signal(signal.SIGSTOP)
            content = grown(steps, tile_px=tile_px)
            before, slowest = me.memory_info().rss, 0.0
            for step in range(2, steps + 1):
                # New tiles each time, or what is queued would be the same memory over and over.
                fresh = grown(1, tile_px=tile_px).tiles[-1, -2]
                number = step - 1
                key = (-1, number % 4 - 2)
                tiles = {**content.tiles, key: replace(fresh, version=step)}
                started = time.monotonic()
                source.publish(
                    replace(
                        content,
                        tiles=tiles,
                        frame_numbers=content.frame_numbers[:step],
                        position_yx_m=content.position_yx_m[:step],
                        counts={"committed": step},
                    )
                )
                content = replace(content, tiles=tiles)
                slowest = max(slowest, time.monotonic() - started)
            grew = me.memory_info().rss - before
            source.publish(replace(content, state="complete", final=True))
            slow.send_signal(signal.SIGCONT)
            lines, _ = slow.communicate(timeout=30)
        finally:
            slow.kill()
            slow.wait()
            slow.stdout.close()
    assert slowest < 0.5
    assert grew < 100e6, f"{grew / 1e6:.0f} MB"
    seen = [int(line.split()[0]) for line in lines.splitlines()]
    assert seen[-1] == steps and lines.splitlines()[-1].endswith(" 1")
    assert len(seen) < steps, "a slow subscriber skips images"


def test_a_client_that_hammers_the_resync_socket_is_told_to_wait():
    from ptycho_stream.wire import results as wire

    with Source() as source, zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        source.publish(grown(3))
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(source.endpoints[1])
        for number in range(50):
            socket.send_multipart(wire.encode(wire.ResyncRequest(id=number)))
        kinds = []
        while socket.poll(500):
            kinds.append(type(wire.decode_server_message(socket.recv_multipart())))
        assert kinds[0] is wire.ImageUpdate
        # Most were refused, or dropped because the client did not read.
        assert kinds.count(wire.ImageUpdate) < 5 and wire.Refusal in kinds


def test_rubbish_on_the_results_socket_is_counted_and_left_behind():
    settings = free_settings()
    with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
        publisher.bind(settings.endpoint)
        with ResultStream(settings.endpoint, settings.resync_endpoint, timeout_s=10) as results:
            end = time.monotonic() + 5
            while results._link.follower.undecodable < 3 and time.monotonic() < end:
                publisher.send_multipart([b"image/x", b"\x81\xa4type\xa5image"])
                publisher.send_multipart([b"beacon"])
                publisher.send_multipart([b"beacon", b"\xc1"])
                results._turn(time.monotonic() + 0.05)
            assert results._link.follower.undecodable >= 3


def test_the_asyncio_twin_does_the_same():
    async def follow(source):
        async with AsyncResultStream(*source.endpoints, timeout_s=5) as results:
            assert await results.latest() is None
            source.publish(grown(3))
            image = await anext(results)
            assert image.scan_id == SCANS[0]
            source.publish(grown(4, state="complete", final=True))
            image = await results.wait_complete(timeout_s=5)
            assert same_picture(image, grown(4, state="complete", final=True))
            assert same_picture(await results.latest(), grown(4, state="complete", final=True))
        async with AsyncResultStream(*source.endpoints, scan_id=SCANS[0]) as results:
            async for image in results:
                assert image.final

    with Source() as source:
        asyncio.run(follow(source))


def test_a_cancelled_wait_of_the_asyncio_twin_leaves_it_with_the_newest_scan():
    async def follow(source):
        async with AsyncResultStream(*source.endpoints, timeout_s=5) as results:
            source.publish(grown(2, SCANS[0]))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(results.wait_complete(SCANS[0]), 0.3)
            source.publish(grown(1, SCANS[1]))
            async with asyncio.timeout(10):
                while (await anext(results)).scan_id != SCANS[1]:
                    pass

    with Source() as source:
        asyncio.run(follow(source))


def test_the_asyncio_twin_says_when_nothing_is_heard():
    settings = free_settings()

    async def follow():
        async with AsyncResultStream(
            settings.endpoint, settings.resync_endpoint, timeout_s=0.3
        ) as results:
            await results.latest()

    with pytest.raises(EndpointError, match="nothing heard"):
        asyncio.run(follow())


def test_a_wrong_endpoint_is_an_error_at_once():
    with pytest.raises(EndpointError, match="tcp://HOST:PORT"):
        ResultStream("nonsense")


def test_a_live_picture_without_ipython_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with (
        Source() as source,
        ResultStream(*source.endpoints) as results,
        pytest.raises(MissingPackage, match=r"ptycho-stream\[notebook\]"),
    ):
        results.show()
