"""The Prometheus metrics of the viewer."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class ViewerMetrics:
    """All metrics of the process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pages = Gauge(
            "ptycho_stream_viewer_pages", "Pages that are open now", registry=self.registry
        )
        self.updates = Counter(
            "ptycho_stream_viewer_updates",
            "Messages with pixels that were sent to pages",
            registry=self.registry,
        )
        self.sent_bytes = Counter(
            "ptycho_stream_viewer_sent_bytes", "Sent to pages", registry=self.registry
        )
        self.commands = Counter(
            "ptycho_stream_viewer_commands",
            "Commands that people gave on pages",
            ["command"],
            registry=self.registry,
        )
        self.refused = Counter(
            "ptycho_stream_viewer_requests_refused",
            "Refused: strangers (host, origin, token), too many pages, messages that are none",
            ["reason"],
            registry=self.registry,
        )
