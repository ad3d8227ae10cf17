"""The dashboard and the alerts that come with the exporter, and a real Prometheus that scrapes it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmpool import Pool, PoolStats, PoolTimeout
from shmpool.exporter import BOUNDS
from shmpool.stats import SOURCES, UNCOUNTED
from tests.processes import Family, holder, proven, until, use
from tests.servers import ExclusiveServer
from tests.test_exporter import DEADLINE_S, GUIDE, POOL, Scrape, scraped, served
from tests.tools import tool

DASHBOARD = json.loads((GUIDE.parent.parent / "grafana" / "shmpool.json").read_text(encoding="utf-8"))
VARIABLES = {each["name"]: each for each in DASHBOARD["templating"]["list"]}
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
METRIC = re.compile(r"\b((?:db_client|shmpool)_\w+)\b(?:\{([^}]*)\})?")
OF_PROMETHEUS = {"instance", "le"}


def targets() -> list[dict[str, Any]]:
    return [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def expressions() -> list[str]:
    return [target["expr"] for target in targets()]


def alert_rules() -> str:
    (rules,) = re.findall(r"^```yaml\n(groups:.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return str(rules)


# The dashboard ------------------------------------------------------------------------------------------------------


def series_of(scrape: Scrape) -> dict[str, dict[str, set[str]]]:
    """The labels of each series' name, and the values that each of them has."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in scrape.families.values():
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def offences(expression: str, there: dict[str, dict[str, set[str]]]) -> Iterator[str]:
    """What the expression names that there is not."""
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", expression))))
    known = set(OF_PROMETHEUS)
    for name, matchers in METRIC.findall(re.sub(r"\bby \([^)]*\)", "", expression)):
        labels = there.get(name)
        if labels is None:
            yield name
            continue
        known |= labels.keys()
        wanted = re.findall(r'(\w+)(=~|=|!=|!~)"([^"]*)"', matchers)
        for label, operator, value in wanted:
            if label not in labels and label not in OF_PROMETHEUS:
                yield f"{name}{{{label}}}"
            elif operator == "=" and value not in labels[label]:
                yield f'{name}{{{label}="{value}"}}'
        chosen = {(label, operator, value) for label, operator, value in wanted}
        if POOL in labels and (POOL, "=~", "$pool") not in chosen:
            yield f"{name} of all pools"
        if ("instance", "=~", "$instance") not in chosen:
            yield f"{name} of all hosts"
    yield from sorted(grouped - known)


@pytest.fixture
def there(server: ExclusiveServer) -> Iterator[dict[str, dict[str, set[str]]]]:
    with Pool(server.url, maintenance_interval=math.inf) as pool:
        pool.get().release()
        yield series_of(scraped(pool))


def test_the_dashboard_names_what_there_is(there: dict[str, dict[str, set[str]]]) -> None:
    assert len(expressions()) > 30
    for expression in expressions():
        assert list(offences(expression, there)) == [], expression
    for target in targets():
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        grouped = re.search(r"\bby \(([^)]*)\)", target["expr"])
        assert grouped
        assert shown <= set(grouped[1].split(", ")), target["expr"]
    for name in ("pool", "instance"):
        asked = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", VARIABLES[name]["query"]["query"])
        assert asked
        assert asked[2] in there[asked[1]].keys() | OF_PROMETHEUS


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("sum by (x) (shmpool_slots{P, I})", ["x"]),
        ("shmpool_slot{P, I}", ["shmpool_slot"]),
        ("shmpool_slots{P, I, kind=~'.*'}".replace("'", '"'), ["shmpool_slots{kind}"]),
        ('rate(shmpool_leases_total{P, I, source="none"}[1m])', ['shmpool_leases_total{source="none"}']),
        ("shmpool_slots{I}", ["shmpool_slots of all pools"]),
        ("shmpool_slots{P} / shmpool_pools{I}", ["shmpool_slots of all hosts"]),
        ("sum by (le) (shmpool_queue_time_seconds_bucket{P, I})", []),
    ],
)
def test_what_there_is_not_is_found(expression: str, found: list[str], there: dict[str, dict[str, set[str]]]) -> None:
    expression = expression.replace("P", f'{POOL}=~"$pool"').replace("I", 'instance=~"$instance"')
    assert list(offences(expression, there)) == found


def test_the_dashboard_can_be_imported() -> None:
    assert DASHBOARD["id"] is None
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        mine = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not places & mine, panel["title"]
        places |= mine
        assert panel["type"] == "row" or panel["targets"]
    sources = [each["datasource"] for each in [*panels, *targets(), *VARIABLES.values()] if "datasource" in each]
    assert len(sources) > len(targets())
    assert all(each == SOURCE for each in sources), "nobody else has our data source"
    assert VARIABLES["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(DASHBOARD)))
    assert used == set(VARIABLES)


# The real one -------------------------------------------------------------------------------------------------------


class Prometheus:
    """A server with one target, asked over its HTTP API."""

    def __init__(self, address: str) -> None:
        self._url = f"http://{address}/api/v1"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, **arguments: str) -> Any:
        query = urllib.parse.urlencode(arguments)
        try:
            with self._opener.open(f"{self._url}/{path}?{query}", timeout=DEADLINE_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path} {arguments}: {error.read().decode()}") from error
        assert answer["status"] == "success"
        assert "warnings" not in answer
        return answer["data"]

    def values(self, expression: str, label: str = "") -> dict[str, float]:
        """The present value of an expression by one of its labels."""
        rows = self.ask("query", query=expression)["result"]
        found = {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}
        assert len(found) == len(rows), expression
        return found


@contextlib.contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    config = directory / "prometheus.yml"
    (directory / "rules.yml").write_text(alert_rules(), encoding="utf-8")
    config.write_text(
        "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n"
        "rule_files: [rules.yml]\n"
        f"scrape_configs: [{{job_name: shmpool, static_configs: [{{targets: ['{target}']}}]}}]\n",
        encoding="utf-8",
    )
    command = [
        tool("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    log = directory / "log"

    def begun() -> bool:
        assert process.poll() is None, log.read_text()
        return "Server is ready" in log.read_text() and bool(listening())

    def listening() -> list[str]:
        return re.findall(r"\baddress=(127\.0\.0\.1:[1-9]\d*)", log.read_text())

    with log.open("w") as written, subprocess.Popen(command, stdout=written, stderr=written) as process:
        try:
            until(begun, "Prometheus is ready")
            yield Prometheus(listening()[0])
        finally:
            process.kill()
    assert re.findall(r"level=(?:warn|error).*", log.read_text()) == []


def test_promtool_takes_the_alerts(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(alert_rules(), encoding="utf-8")
    done = subprocess.run(
        [tool("promtool"), "check", "rules", str(rules)], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"SUCCESS: {alert_rules().count('- alert:')} rules found" in done.stdout


def load(pool: Pool, family: Family) -> None:
    """More processes than connections, one that is killed, one that waits in vain. The pool is at rest afterwards."""

    def work() -> None:
        for _ in range(100):
            use(pool)

    def in_vain() -> None:
        with pytest.raises(PoolTimeout):
            pool.get(timeout=0.05)

    workers = [family.fork(work) for _ in range(5)]
    for worker in workers:
        worker.result()
    holds = holder(family, pool, 3)
    family.fork(in_vain).result()
    assert holds.kill() == signal.SIGKILL.name
    pool.recover()


def told(server: Prometheus, pool: str) -> dict[str, dict[str, float]]:
    selector = f'{{{POOL}="{pool}"}}'
    labels = {
        "db_client_connection_count": "db_client_connection_state",
        "db_client_connection_max": "",
        "db_client_connection_timeouts_total": "",
        "db_client_connection_use_time_seconds_count": "",
        "shmpool_connections_created_total": "kind",
        "shmpool_connections_closed_total": "reason",
        "shmpool_leases_total": "source",
        "shmpool_recovered_total": "what",
        "shmpool_slots": "state",
        "shmpool_workers_alive": "",
    }
    return {name: server.values(f"{name}{selector}", label) for name, label in labels.items()}


def expected(stats: PoolStats) -> dict[str, dict[str, float]]:
    taken_back = {what: getattr(stats, f"recovered_{what}") for what in ("leases", "offers", "waiters")}
    return {
        "db_client_connection_count": {"idle": stats.idle, "used": stats.in_use},
        "db_client_connection_max": {"": stats.max_connections},
        "db_client_connection_timeouts_total": {"": stats.timeouts},
        "db_client_connection_use_time_seconds_count": {"": stats.use_latency.count},
        "shmpool_connections_created_total": {kind: each.created for kind, each in stats.kinds.items()},
        "shmpool_connections_closed_total": {each: n for each, n in stats.closed.items() if each != UNCOUNTED},
        "shmpool_leases_total": {source: getattr(stats, source) for source in SOURCES},
        "shmpool_recovered_total": taken_back,
        "shmpool_slots": dict(stats.connections),
        "shmpool_workers_alive": {"": sum(worker.alive for worker in stats.workers)},
    }


def assert_quantile(value: float, exact: float) -> None:
    """Within the exporter's bucket that holds the exact one, whose own bucket is 3.1 % wide."""
    lower = max((bound for bound in BOUNDS if bound < exact * 0.96), default=0)
    upper = min(bound for bound in BOUNDS if bound > exact * 1.04)
    assert lower <= value <= upper


def assert_dashboard(server: Prometheus, pool: str) -> None:
    """Every expression is answered with something."""
    for variable in ("pool", "instance"):
        metric, label = re.findall(r"\((\w+).*, (\w+)\)", VARIABLES[variable]["query"]["query"])[0]
        values = server.ask(f"label/{label}/values", **{"match[]": f'{metric}{{{POOL}="{pool}"}}'})
        assert len(values) == 1
    for expression in expressions():
        asked = expression.replace("$pool", pool).replace("$instance", ".*").replace("$__rate_interval", "1m")
        assert "$" not in asked
        assert server.ask("query", query=asked)["result"], asked


def assert_rules(server: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        return [rule for group in server.ask("rules")["groups"] for rule in group["rules"]]

    until(lambda: all(rule["health"] != "unknown" for rule in rules()), "all rules are evaluated")
    assert len(rules()) == alert_rules().count("- alert:")
    assert {(rule["health"], rule.get("lastError", "")) for rule in rules()} == {("ok", "")}


def target(server: Prometheus) -> tuple[str, str]:
    (only,) = server.ask("targets")["activeTargets"]
    return only["health"], only["lastError"]


def test_a_real_prometheus(server: ExclusiveServer, family: Family, tmp_path: Path) -> None:
    with (
        proven(server, 3, maintenance_interval=math.inf) as pool,
        served() as exporter,
        prometheus(urllib.parse.urlsplit(exporter.url).netloc, tmp_path) as real,
    ):
        of_pool = f'{POOL}="{pool.name}"'
        until(lambda: real.values(f"db_client_connection_max{{{of_pool}}}"), "the first scrape of the pool at rest")
        until(lambda: real.values("up") == {"": 1}, "it is up")  # a busy machine misses a scrape now and then
        load(pool, family)
        stats = pool.stats()
        assert (stats.successes, stats.recovered_leases, stats.timeouts) == (503, 3, 1)
        until(lambda: told(real, pool.name) == expected(stats), "the figures are scraped")

        buckets = f"rate(db_client_connection_use_time_seconds_bucket{{{of_pool}}}[1m])"
        for share, exact in ((0.5, stats.use_latency.p50), (0.99, stats.use_latency.p99)):
            assert_quantile(real.values(f"histogram_quantile({share}, {buckets})")[""], exact)
        assert_dashboard(real, pool.name)
        assert_rules(real)
        until(lambda: target(real) == ("up", ""), "scrapes succeed")
