"""The checks of ``ptycho-stream doctor`` that concern PV Access: library, server and channels.

A channel's images go to everybody who asks, so that looking takes nothing away.
"""

from __future__ import annotations

from typing import Any

from ptycho_stream.cli.checkup import Finding
from ptycho_stream.errors import SettingsError
from ptycho_stream.settings import PVA_SCHEME, DetectorSettings
from ptycho_stream.wire.pva_library import client_configuration, pva_module


def check_channels(name: str, detector: DetectorSettings, timeout_s: float) -> list[Finding]:
    """A finding for the images' channel, and one for that which tells of acquisitions."""
    options = detector.pva
    channels = {name: detector.endpoint}
    if options.acquire_channel is not None:
        channels[f"{name}.pva.acquire_channel"] = PVA_SCHEME + options.acquire_channel
    try:
        library = pva_module("client.thread")
    except SettingsError as error:
        return [Finding(name, "no library", detector.endpoint, str(error), ok=False)]
    configuration = client_configuration(options.servers)
    context = library.Context("pva", conf=configuration, useenv=configuration is None, nt=False)
    try:
        return [
            _check_channel(context, subject, channel, options.servers, timeout_s)
            for subject, channel in channels.items()
        ]
    finally:
        context.close()


def _check_channel(
    context: Any, subject: str, endpoint: str, servers: tuple[str, ...], timeout_s: float
) -> Finding:
    channel = endpoint.removeprefix(PVA_SCHEME)
    try:
        value = context.get(channel, request="field(uniqueId,value)", timeout=timeout_s)
    except TimeoutError:
        asked = ", ".join(servers) or "the local networks (EPICS_PVA_ADDR_LIST)"
        text = f"no answer from {asked}: start the IOC, or correct endpoint or pva.servers"
        return Finding(subject, "refused", endpoint, text, ok=False)
    except RuntimeError as error:
        return Finding(subject, "wrong kind", endpoint, f"it cannot be read: {error}", ok=False)
    if "uniqueId" in value:
        pixels = "no image yet" if value.value is None else f"image {value.uniqueId} is there"
        return Finding(subject, "OK", endpoint, f"connected, {pixels}")
    if subject.endswith("acquire_channel"):
        return Finding(subject, "OK", endpoint, "connected")
    text = "it is no NTNDArray: name the channel of the driver's PVA plugin, such as ...:Pva1:Image"
    return Finding(subject, "wrong kind", endpoint, text, ok=False)
