"""A detector that is the wrong way round is turned once for each view, not at every heartbeat."""

from __future__ import annotations

from typing import Any

from ptycho_streamd.requests import SET_VIEW
from ptycho_streamd.view_trigger import ViewTrigger


class Orders:
    """In the place of ``Requests``: what was ordered, and whether ingest runs."""

    def __init__(self) -> None:
        self.ordered: list[dict[str, Any]] = []
        self.up = True

    def order(self, step: object, arguments: dict[str, Any]) -> bool:
        assert step is SET_VIEW
        if self.up:
            self.ordered.append(arguments)
        return self.up


def wanted(
    scan_id: str = "a",
    version: int = 1,
    orientation: str | None = "flip_x",
    center_yx_px: list[float] | None = None,
    bad_pixels_yx: list[list[int]] | None = None,
) -> dict[str, Any]:
    view = {
        "scan_id": scan_id,
        "view_version": version,
        "orientation": orientation,
        "center_yx_px": center_yx_px,
        "bad_pixels_yx": bad_pixels_yx,
    }
    return {"verdict": "orientation suspect", "view_wanted": view}


def test_what_is_wanted_is_ordered_once_for_each_view():
    orders = Orders()
    trigger = ViewTrigger(orders)  # type: ignore[arg-type]
    for status in ({}, {"view_wanted": None}, wanted(), wanted(), {}, wanted()):
        trigger.look(status)
    assert orders.ordered == [
        {
            "scan_id": "a",
            "orientation": "flip_x",
            "center_yx_px": None,
            "dc": None,
            "bad_pixels_yx": None,
        }
    ]
    trigger.look(wanted(version=2, orientation="flip_y"))
    trigger.look(wanted("b"))
    assert [one["scan_id"] for one in orders.ordered] == ["a", "a", "b"]


def test_it_is_ordered_again_where_ingest_was_not_there():
    orders = Orders()
    orders.up = False
    trigger = ViewTrigger(orders)  # type: ignore[arg-type]
    trigger.look(wanted())
    orders.up = True
    trigger.look(wanted())
    trigger.look(wanted())
    assert len(orders.ordered) == 1


def test_a_pattern_off_its_centre_is_looked_at_where_it_is(caplog):
    orders = Orders()
    trigger = ViewTrigger(orders)  # type: ignore[arg-type]
    trigger.look(wanted(orientation=None, center_yx_px=[30.0, 33.5]))
    trigger.look(wanted(version=2, center_yx_px=[31.0, 33.5]))
    assert [(one["orientation"], one["center_yx_px"]) for one in orders.ordered] == [
        (None, [30.0, 33.5]),
        ("flip_x", [31.0, 33.5]),
    ]
    first, second = caplog.messages
    assert first == "scan a: its pattern is off centre; center_yx_px becomes [30.0, 33.5]"
    assert "flip_x; its pattern is off centre" in second


def test_pixels_that_lie_are_masked(caplog):
    orders = Orders()
    trigger = ViewTrigger(orders)  # type: ignore[arg-type]
    trigger.look(wanted(orientation=None, bad_pixels_yx=[[3, 5], [4, 5]]))
    assert orders.ordered[0]["bad_pixels_yx"] == [[3, 5], [4, 5]]
    assert "2 of its stored pixels lie and are masked: (3, 5), (4, 5)" in caplog.text
