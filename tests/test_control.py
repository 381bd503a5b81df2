"""Every control request is answered, also a damaged one; clients say what to check in silence."""

import asyncio
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq
from results_source import free_ports

from ptycho_stream.client import AsyncDaemon, Daemon
from ptycho_stream.errors import ControlError, EndpointError, MalformedMessage
from ptycho_stream.wire import control as wire
from ptycho_streamd.control import ControlServer
from ptycho_streamd.security import Gate


@pytest.fixture
def endpoint():
    return f"tcp://127.0.0.1:{free_ports(1)[0]}"


class Answering:
    """A server in a thread that answers with ``answer(request)``."""

    def __init__(self, endpoint, answer):
        self._answer = answer
        self._gate = Gate()
        self.server = ControlServer(self._gate, endpoint)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        while not self._over.is_set():
            if self.server.socket.poll(20):
                for request in self.server.poll():
                    self._answer(self.server, request)

    def __enter__(self):
        self._thread.start()
        return self.server

    def __exit__(self, *exc_info):
        self._over.set()
        self._thread.join()
        self.server.close()
        self._gate.close()


def echo(server, request):
    server.reply(request, {"command": request.command, "arguments": request.arguments})


def test_each_method_sends_its_command_with_all_arguments(endpoint):
    with Answering(endpoint, echo), Daemon(endpoint) as daemon:
        assert daemon.status() == {"command": "status", "arguments": {}}
        assert daemon.scans(5)["arguments"] == {"limit": 5}
        assert daemon.scan("X")["arguments"] == {"scan_id": "X"}
        assert daemon.models()["command"] == "models"
        assert daemon.start({"sample": "star"}, 100)["arguments"] == {
            "metadata": {"sample": "star"},
            "expected_frames": 100,
            "series": None,
        }
        assert daemon.stop()["arguments"] == {"scan_id": None}
        assert daemon.abort("X")["command"] == "abort"
        assert daemon.export(formats=["npz", "png"])["arguments"] == {
            "scan_id": None,
            "formats": ["npz", "png"],
        }
        assert daemon.snapshot("a", force=True)["arguments"] == {
            "name": "a",
            "scan_id": None,
            "force": True,
        }
        assert daemon.snapshots("X")["arguments"] == {"scan_id": "X"}
        assert daemon.history(limit=7)["arguments"] == {"scan_id": None, "limit": 7}
        asked = daemon.reprocess("X", center_yx_px=(3.0, 4.0), probe="/p.npz")["arguments"]
        assert {key: value for key, value in asked.items() if value is not None} == {
            "scan_id": "X",
            "center_yx_px": [3.0, 4.0],
            "probe": "/p.npz",
        }
        assert daemon.use_model("mine")["arguments"] == {"name": "mine"}
        assert daemon.rollback_model() == {"command": "rollback_model", "arguments": {}}
        asked = daemon.finetune("X", "Y", minutes=2.0, model="mine")["arguments"]
        given = {key: value for key, value in asked.items() if value is not None}
        assert given == {"scan_ids": ["X", "Y"], "minutes": 2.0, "model": "mine"}
        asked = daemon.train(architecture="cnn", network={"size_px": 64})
        assert asked["command"] == "train"
        assert asked["arguments"]["network"] == {"size_px": 64}
        assert daemon.jobs()["arguments"] == {"limit": 20}
        assert daemon.job("J")["arguments"] == {"job_id": "J"}
        assert daemon.cancel() == {"command": "cancel", "arguments": {"job_id": None}}
        assert daemon.reload()["command"] == "reload"
        assert daemon.endpoints()["command"] == "endpoints"


def test_results_may_hold_numpy_scalars_and_paths(endpoint):
    result = {"n": np.int64(3), "x": np.float32(0.5), "path": Path("a") / "b"}
    with Answering(endpoint, lambda s, r: s.reply(r, result)), Daemon(endpoint) as daemon:
        assert daemon.status() == {"n": 3, "x": 0.5, "path": "a/b"}


def test_a_failure_is_an_error_with_a_code(endpoint):
    def refuse(server, request):
        server.fail(request, "not_found", "no scan X: see `ctl scans`")

    with Answering(endpoint, refuse), Daemon(endpoint) as daemon:
        with pytest.raises(ControlError, match="no scan X") as caught:
            daemon.scan("X")
        assert caught.value.code == "not_found"


def test_a_result_that_cannot_be_sent_is_answered_as_a_failure(endpoint):
    with Answering(endpoint, lambda s, r: s.reply(r, object())), Daemon(endpoint) as daemon:
        with pytest.raises(ControlError) as caught:
            daemon.status()
        assert caught.value.code == "failed"


@pytest.mark.parametrize(
    ("parts", "code", "reply_id"),
    [
        ([b"\xc1"], "bad_request", None),
        ([b""], "bad_request", None),
        ([msgspec.msgpack.encode([1, 2])], "bad_request", None),
        ([msgspec.msgpack.encode({"v": 1, "id": 7})], "bad_request", 7),
        ([msgspec.msgpack.encode({"v": 2, "id": 7, "command": "status"})], "bad_request", 7),
        ([msgspec.msgpack.encode({"v": 1, "id": [], "command": "status"})], "bad_request", None),
        ([msgspec.msgpack.encode({"v": 1, "id": "a", "command": "no"})], "unknown_command", "a"),
        (
            [msgspec.msgpack.encode({"id": 1, "command": "scans", "arguments": {"limit": "x"}})],
            "bad_arguments",
            1,
        ),
        (
            [msgspec.msgpack.encode({"id": 1, "command": "scans", "arguments": {"other": 1}})],
            "bad_arguments",
            1,
        ),
        *(
            ([wire.encode_request(1, command, arguments)], "bad_arguments", 1)
            for command, arguments in (
                ("scans", {"limit": 0}),
                ("scans", {"limit": 2**62}),
                ("start", {"expected_frames": 0}),
                ("start", {"expected_frames": 2**40 + 1}),
                ("start", {"expected_frames": 2**63 + 5}),
                ("start", {"series": ""}),
                ("start", {"series": "x" * 300}),
                ("start", {"series": "1\nSTATUS=fine"}),
                ("start", {"metadata": {"a": [[[[[[[[[[1]]]]]]]]]]}}),
                ("start", {"metadata": {"a": list(range(10_001))}}),
                ("finetune", {"scan_ids": ["X"] * 101}),
                ("finetune", {"minutes": float("nan")}),
                ("finetune", {"minutes": float("inf")}),
                ("finetune", {"architecture": "cnn"}),
                ("train", {"model": "mine"}),
                ("train", {"network": {"a": [[[[[[[[[[1]]]]]]]]]]}}),
                ("train", {"frames": [1, 2, 3]}),
                ("jobs", {"limit": 0}),
                ("use_model", {}),
                ("snapshot", {}),
                ("snapshot", {"name": "../a"}),
                ("snapshot", {"name": "a\n"}),
                ("snapshot", {"name": "x" * 65}),
                ("history", {"limit": 1}),
                ("reprocess", {"orientation": "upside-down"}),
                ("reprocess", {"center_yx_px": [float("nan"), 1.0]}),
                ("reprocess", {"center_yx_px": [1.0]}),
                ("reprocess", {"dc": "middle"}),
                ("reprocess", {"probe": "relative.npz"}),
                ("reprocess", {"probe": "/" + "x" * 4096}),
                ("reprocess", {"probe": "/a\0b"}),
                ("reprocess", {"bad_pixels": "relative.npy"}),
                ("reprocess", {"flat_field": "dark-frames"}),
                ("reprocess", {"background": "none\n"}),
                ("reprocess", {"model": "a\nSTATUS=fine"}),
            )
        ),
        ([wire.encode_request(1, "status", {}), b"more"], "bad_request", 1),
        ([b"\x91" * 100_000], "bad_request", None),
    ],
)
def test_every_damaged_request_is_answered(endpoint, parts, code, reply_id):
    with (
        Answering(endpoint, echo) as server,
        zmq.Context() as context,
        context.socket(zmq.DEALER) as socket,
    ):
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send_multipart(parts)
        assert socket.poll(5000)
        reply = wire.decode_reply(socket.recv())
        assert (reply.ok, reply.error.code, reply.id) == (False, code, reply_id)
        assert server.requests_refused == 1
        socket.send(wire.encode_request(2, "status", {}))
        assert socket.poll(5000)
        assert wire.decode_reply(socket.recv()).ok


def test_metadata_of_a_start_hold_nothing_that_is_not_json(endpoint):
    with Answering(endpoint, echo), Daemon(endpoint) as daemon:
        answer = daemon.start({"a": float("nan"), "b": b"xx", "c": [1.5, None]})
        assert answer["arguments"]["metadata"] == {"a": "nan", "b": "b'xx'", "c": [1.5, None]}


def test_a_request_that_is_too_long_does_not_reach_the_daemon(endpoint):
    with Answering(endpoint, echo), Daemon(endpoint, timeout_s=1) as daemon:
        with pytest.raises(EndpointError):
            daemon.start({"comment": "x" * (wire.MAX_REQUEST_BYTES + 1)})
        assert daemon.status()["command"] == "status"


def test_a_req_socket_is_served_too(endpoint):
    with Answering(endpoint, echo), zmq.Context() as context, context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send(wire.encode_request("q", "reload", {}))
        assert socket.poll(5000)
        assert wire.decode_reply(socket.recv()).result["command"] == "reload"


def test_replies_may_come_late_and_in_another_order(endpoint):
    waiting = []

    def hold(server, request):
        waiting.append(request)
        if len(waiting) == 2:
            for held in reversed(waiting):
                server.reply(held, held.arguments["scan_id"])

    async def ask(daemon, scan_id):
        return await daemon.scan(scan_id)

    async def both():
        async with AsyncDaemon(endpoint) as one, AsyncDaemon(endpoint) as two:
            return await asyncio.gather(ask(one, "A"), ask(two, "B"))

    with Answering(endpoint, hold):
        assert asyncio.run(both()) == ["A", "B"]


def test_silence_is_an_error_and_the_request_is_not_carried_out_later(endpoint):
    taken = []
    with Daemon(endpoint, timeout_s=0.3) as daemon:
        with pytest.raises(EndpointError, match=r"control\.endpoint"):
            daemon.start()

        def note(server, request):
            taken.append(request.command)
            server.reply(request, None)

        with Answering(endpoint, note):
            assert daemon.call("status", timeout_s=5) is None
        assert taken == ["status"]


def test_the_asyncio_twin_sends_each_command(endpoint):
    async def all_of_them():
        async with AsyncDaemon(endpoint) as daemon:
            calls = (
                daemon.status(),
                daemon.scans(),
                daemon.scan(),
                daemon.models(),
                daemon.start(),
                daemon.stop(),
                daemon.abort(),
                daemon.export(),
                daemon.snapshot("a"),
                daemon.snapshots(),
                daemon.history(),
                daemon.reprocess(),
                daemon.use_model("mine"),
                daemon.rollback_model(),
                daemon.finetune(),
                daemon.train(),
                daemon.jobs(),
                daemon.job(),
                daemon.cancel(),
                daemon.reload(),
                daemon.endpoints(),
            )
            sent = [(await call)["command"] for call in calls]
            # An echo is neither.
            for name, call in (("frame", daemon.frame("X", 3)), ("image", daemon.image("X"))):
                with pytest.raises(MalformedMessage, match=name):
                    await call
                sent.append(name)
            return sent

    with Answering(endpoint, echo):
        assert set(asyncio.run(all_of_them())) == set(wire.COMMANDS)


def test_the_asyncio_twin_says_when_nothing_answers(endpoint):
    async def ask():
        async with AsyncDaemon(endpoint, timeout_s=0.2) as daemon:
            await daemon.status()

    with pytest.raises(EndpointError, match="is ptycho-streamd running"):
        asyncio.run(ask())


def test_a_port_in_use_is_an_error_that_names_the_setting(endpoint):
    gate = Gate()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as other:
        other.bind(endpoint)
        with pytest.raises(EndpointError, match=r"control\.endpoint.*in use"):
            ControlServer(gate, endpoint)
    gate.close()
