"""A flood of bad messages makes few log lines and loses no count."""

import logging

from ptycho_streamd import log_limit
from ptycho_streamd.log_limit import LimitedLog


def test_a_flood_is_one_line_and_a_count(caplog, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(log_limit.time, "monotonic", lambda: clock[0])
    log = LimitedLog(logging.getLogger("flood"))
    for _ in range(500):
        log.warning("torn", "a part is missing")
    log.warning("malformed", "not JSON")
    clock[0] += 1.1
    log.warning("torn", "a part is missing")
    assert [record.getMessage() for record in caplog.records] == [
        "a part is missing",
        "not JSON",
        "a part is missing (and 499 more like it)",
    ]
