"""The Grafana dashboard asks for metrics and labels that the server really has."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_client import Server

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "tsqp.json"
SAMPLE = re.compile(r"(\w+)\{([^}]*)\} ")


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def _queries() -> Iterator[str]:
    board = json.loads(DASHBOARD.read_text())
    for panel in _panels():
        assert panel["targets"], panel["title"]
        yield from (target["expr"] for target in panel["targets"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]["query"]


@pytest.fixture(scope="module")
def labels(watched_server: Server) -> dict[str, set[str]]:
    """The labels of every sample in /metrics, after one request."""
    assert watched_server.chat().status == 200
    text = watched_server.ask("/metrics").body.decode()
    found: dict[str, set[str]] = {}
    for name, given in SAMPLE.findall(text):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', given))
    return found


def test_every_query_names_a_metric_and_labels_of_the_server(labels: dict[str, set[str]]) -> None:
    queries = list(_queries())
    assert len(queries) > 30
    for query in queries:
        names = re.findall(r"tsqp_\w+", query)
        assert names, query
        for name in names:
            assert name in labels, name
            wanted = set(re.findall(r"(\w+)=~", query)) | set(re.findall(r"by \((\w+)\)", query))
            assert wanted <= labels[name], query


def test_every_metric_is_on_the_dashboard(labels: dict[str, set[str]]) -> None:
    asked = " ".join(_queries())
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in labels}
    families = {
        name for name in families if f"{name}_total" not in labels
    }  # `_created` of counters
    assert [name for name in sorted(families) if name not in asked] == []


def test_legends_name_labels_that_their_queries_keep() -> None:
    for panel in _panels():
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert f"by ({label})" in target["expr"]


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = _panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    taken = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_prometheus_can_read_the_queries(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(_queries())
        if not query.startswith("label_values")  # which is Grafana's own
    ]
    file = tmp_path / "rules.json"  # JSON is YAML
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    result = subprocess.run(
        [promtool, "check", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stdout + result.stderr
