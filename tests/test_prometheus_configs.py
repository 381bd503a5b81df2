"""Prometheus rules and Grafana dashboards use metrics that are documented, and fit together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_page import EVERYWHERE, ROOT, documented

from ptycho_stream.verdicts import HARMLESS

PROMETHEUS = ROOT / "configs" / "prometheus"
GRAFANA = ROOT / "configs" / "grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
SELECTOR = re.compile(r"\b((?:instance:)?ptycho_stream_[\w:]+|up|ALERTS)\b(?:{([^}]*)})?")
PROMETHEUS_OWN = {"up": set(), "ALERTS": {"alertname"}}


def rules(name: str) -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / name).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return json.loads(dashboard.read_text())["panels"]


def queries() -> Iterator[tuple[str, str]]:
    """Every expression of rules and dashboards, with the place where it stands."""
    for name in ("recording.yml", "alerts.yml"):
        for rule in rules(name):
            yield rule.get("alert") or rule["record"], rule["expr"]
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                where = f"{dashboard.stem}: {panel['title']} {target['refId']}"
                yield where, target["expr"]


@pytest.mark.parametrize(("where", "query"), list(queries()))
def test_queries_use_what_is_documented(where, query):
    known = {name: set(metric.labels) for name, metric in documented().items()}
    known |= {rule["record"]: set() for rule in rules("recording.yml")} | PROMETHEUS_OWN
    selectors = SELECTOR.findall(query)
    assert selectors, f"{where} asks for no metric"
    for name, matchers in selectors:
        assert name in known, f"{where}: nobody exposes {name}"
        labels = set(re.findall(r'(\w+)(?:=~|!~|!=|=)"', matchers))
        assert labels <= known[name] | EVERYWHERE, f"{where}: {name} has no labels {labels}"


def test_the_configuration_loads_both_rule_files():
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    assert {PROMETHEUS / name for name in config["rule_files"]} == set(PROMETHEUS.glob("*.yml")) - {
        PROMETHEUS / "prometheus.yml"
    }
    assert config["scrape_configs"][0]["job_name"] == "ptycho-stream"


def test_each_alert_has_a_test_that_fires_it_and_one_that_does_not():
    """They are run by ``promtool test rules``, see tests/interop/test_prometheus.py."""
    tests = yaml.safe_load((ROOT / "tests" / "prometheus" / "alerts.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    alerts = {rule["alert"] for rule in rules("alerts.yml")}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts


def test_alerts_say_what_is_wrong_and_what_to_do():
    page = (ROOT / "docs" / "operations.md").read_text()
    for rule in rules("alerts.yml"):
        name = rule["alert"].removeprefix("PtychoStream")
        assert name != rule["alert"] and re.search(f"`(PtychoStream)?{name}`", page)
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "action"}
        assert "$labels.instance" in rule["annotations"]["summary"]


def test_the_alert_for_verdicts_spares_those_that_accuse_nobody():
    (query,) = [r["expr"] for r in rules("alerts.yml") if r["alert"] == "PtychoStreamImageSuspect"]
    assert f'verdict!~"{"|".join(HARMLESS)}"' in query


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_each_a_place_and_the_chosen_datasource(dashboard):
    board = json.loads(dashboard.read_text())
    assert [variable["name"] for variable in board["templating"]["list"]] == [
        "datasource",
        "instance",
    ]
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["w"] > 0 and place["h"] > 0 and 0 <= place["x"] <= 24 - place["w"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["type"] in ("stat", "timeseries")
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)
        if panel["type"] == "stat":  # else it would show what was true at any time of the range
            assert all(target["instant"] for target in panel["targets"])
    for one, other in combinations((panel["gridPos"] for panel in board["panels"]), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or apart, (one, other)


def test_dashboards_have_identities_of_their_own():
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert len(boards) == len({board["uid"] for board in boards}) == 2


def test_grafana_is_provisioned_with_a_datasource_and_the_dashboards():
    provisioning = GRAFANA / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus" and source["isDefault"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "ptycho-stream.yml").read_text())[
        "providers"
    ]
    assert provider["type"] == "file"
    assert provider["options"]["path"] in (ROOT / "docs" / "operations.md").read_text()
