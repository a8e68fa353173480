"""Metrics: a catalogue that the page, the dashboard and the alerts agree with, and a registry that harms nobody."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from preceptor import metrics as m
from preceptor.errors import PreceptorError
from preceptor.settings import HouseSettings
from preceptor.telemetry import OFF, telemetry

REPOSITORY = Path(__file__).parents[2]
OBSERVABILITY = REPOSITORY / "deploy" / "observability"
PARTS = ("_bucket", "_sum", "_count")


@pytest.fixture
def evaluator() -> Iterator[m.PrometheusMetrics]:
    made = m.PrometheusMetrics(m.EVALUATOR, "127.0.0.1", 0)
    yield made
    made.close()


def scrape(metrics: m.PrometheusMetrics) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics.port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def dashboard_queries() -> list[str]:
    panels = json.loads((OBSERVABILITY / "grafana/dashboards/preceptor.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def alert_queries() -> list[str]:
    groups = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_the_page_has_the_catalogue() -> None:
    script = runpy.run_path(str(REPOSITORY / "scripts" / "generate_metrics_table.py"))
    written = script["PAGE"].read_text()
    assert written == script["page"](written), "run: python scripts/generate_metrics_table.py"


def test_names_say_what_is_counted_and_in_which_unit() -> None:
    names = [metric.name for metric in m.CATALOGUE]
    assert len(set(names)) == len(names)
    for metric in m.CATALOGUE:
        assert re.fullmatch(r"preceptor_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total"), metric.name
        assert (metric.kind == "histogram") == bool(metric.buckets), metric.name
        assert metric.buckets == tuple(sorted(metric.buckets)), metric.name
        assert metric.help, metric.name
        assert set(metric.processes) <= set(m.EVERYBODY), metric.name
        # What there is one of for each run or evaluation would fill Prometheus; runs under way are few.
        assert not {"evaluation", "batch", "trial", "task", "worker"} & set(metric.labels), metric.name


@pytest.mark.parametrize("queries", [dashboard_queries(), alert_queries()], ids=["dashboard", "alerts"])
def test_the_dashboard_and_the_alerts_ask_for_what_there_is(queries: list[str]) -> None:
    kinds = {metric.name: metric for metric in m.CATALOGUE}
    assert queries
    for query in queries:
        for name in re.findall(r"preceptor_[a-z_]+", query):
            part = next((part for part in PARTS if name.endswith(part) and name not in kinds), "")
            metric = kinds.get(name.removesuffix(part))
            assert metric is not None, f"there is no {name}: {query}"
            assert bool(part) == (metric.kind == "histogram"), query
            if part == "_sum":  # of what may be negative the client keeps none
                assert min(metric.buckets) >= 0, query
        for name, labels in re.findall(r"(preceptor_[a-z_]+)\{([^}]*)\}", query):
            known = kinds.get(name) or kinds[re.sub("_(bucket|sum|count)$", "", name)]
            for label, operator, value in re.findall(r'([a-z]+)(=~|!=|=|!~)"([^"]*)"', labels):
                assert label in known.labels, query
                for one in value.split("|") if known.labels[label] and not value.startswith("$") else ():
                    assert one in known.labels[label] or known.labels[label] == ("done",), (query, operator)


def test_the_dashboard_answers_three_questions_in_this_order() -> None:
    panels = json.loads((OBSERVABILITY / "grafana/dashboards/preceptor.json").read_text())["panels"]
    assert [panel["title"] for panel in panels if panel["type"] == "row"] == [
        "Is it learning?",
        "What is slow?",
        "What fails?",
    ]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)


def test_every_alert_says_what_to_do() -> None:
    groups = yaml.safe_load((OBSERVABILITY / "alerts.yml").read_text())["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        assert {"summary", "next"} <= set(rule["annotations"]), rule["alert"]


def test_prometheus_reads_its_settings_the_alerts_and_every_query_of_the_dashboard(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    shutil.copytree(OBSERVABILITY, tmp_path / "o")
    rules = [
        {"record": f"dashboard:{number}", "expr": query.replace("$__rate_interval", "1m").replace("$run", ".*")}
        for number, query in enumerate(dashboard_queries())
    ]
    (tmp_path / "o" / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    for what, file in (("config", "prometheus.yml"), ("rules", "alerts.yml"), ("rules", "queries.yml")):
        said = subprocess.run(
            [promtool, "check", what, str(tmp_path / "o" / file)], capture_output=True, text=True, timeout=60
        )
        assert said.returncode == 0, said.stdout + said.stderr


SERVICES_UP = {f'up{{job="{name}"}}': 1 for name in m.SERVICES}


@pytest.mark.parametrize(
    ("alert", "series", "fires"),
    [
        (
            "PreceptorNobodyWorks",
            {'preceptor_unfinished_batches{queue="trials"}': 3, "preceptor_workers_alive": 0},
            True,
        ),
        (
            "PreceptorNobodyWorks",
            {'preceptor_unfinished_batches{queue="trials"}': 3, "preceptor_workers_alive": 1},
            False,
        ),
        (
            "PreceptorNobodyWorks",
            {'preceptor_unfinished_batches{queue="trials"}': 0, "preceptor_workers_alive": 0},
            False,
        ),
        ("PreceptorServiceDown", {**SERVICES_UP, 'up{job="teacher"}': 0}, True),
        ("PreceptorServiceDown", {**SERVICES_UP, 'up{job="worker"}': 0}, False),
        # Of a container that has ended Docker's DNS knows no address, so Prometheus has no target for it.
        ("PreceptorServiceDown", {name: 1 for name in SERVICES_UP if "evaluator" not in name}, True),
        ("PreceptorWorkersDie", {'preceptor_attempts_total{end="lost"}': "0+1x60"}, True),
        ("PreceptorWorkersDie", {'preceptor_attempts_total{end="given_back"}': "0+1x60"}, False),
        (
            "PreceptorEvaluationsFail",
            {
                'preceptor_evaluations_finished_total{state="failed"}': "0+3x60",
                'preceptor_evaluations_finished_total{state="succeeded"}': "0+7x60",
            },
            True,
        ),
        (
            "PreceptorEvaluationsFail",
            {
                'preceptor_evaluations_finished_total{state="failed"}': "0+1x60",
                'preceptor_evaluations_finished_total{state="succeeded"}': "0+9x60",
            },
            False,
        ),
    ],
)
def test_alerts_fire_when_they_should(tmp_path: Path, alert: str, series: dict[str, object], fires: bool) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    values = [
        {"series": name, "values": value if isinstance(value, str) else f"{value}x60"} for name, value in series.items()
    ]
    # Asked by Prometheus' own series of alerts, so that their words need not be repeated here.
    expected = {
        "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})',
        "eval_time": "40m",
        "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
    }
    test = {"interval": "1m", "input_series": values, "promql_expr_test": [expected]}
    written = {"rule_files": [str(OBSERVABILITY / "alerts.yml")], "evaluation_interval": "1m", "tests": [test]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(written))
    said = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stdout + said.stderr


def test_a_process_tells_its_own_metrics_and_no_other(evaluator: m.PrometheusMetrics) -> None:
    worker = m.PrometheusMetrics(m.WORKER, "127.0.0.1", 0)
    evaluator.count(m.TRIALS, 2, outcome="done")
    worker.count(m.WORKER_TRIALS)
    told, other = scrape(evaluator), scrape(worker)
    worker.close()
    assert told['preceptor_trials_total{outcome="done"}'] == 2
    assert other["preceptor_worker_trials_total"] == 1
    assert "preceptor_worker_trials_total" not in told
    assert not any(name.startswith("preceptor_trials") for name in other)
    assert told["process_resident_memory_bytes"] > 0 or sys.platform != "linux"


def test_counters_with_known_labels_begin_at_0_so_that_the_first_increase_is_one(
    evaluator: m.PrometheusMetrics,
) -> None:
    told = scrape(evaluator)
    assert told['preceptor_attempts_total{end="lost"}'] == 0
    assert told['preceptor_evaluations_finished_total{state="failed"}'] == 0


def test_a_gauge_that_nobody_has_told_is_not_shown_as_0(evaluator: m.PrometheusMetrics) -> None:
    assert not any(name.startswith("preceptor_grpc_streams_open") for name in scrape(evaluator))
    evaluator.add(m.STREAMS, 1, method="x")
    assert scrape(evaluator)['preceptor_grpc_streams_open{method="x"}'] == 1


def test_what_cannot_be_told_at_a_scrape_is_missing_and_counted_and_hides_nothing_else(
    evaluator: m.PrometheusMetrics,
) -> None:
    def away() -> list[m.Sample]:
        raise PreceptorError("BROKER_UNREACHABLE", "Redis does not answer")

    evaluator.at_scrape(away)
    evaluator.at_scrape(lambda: [m.sample(m.BATCHES, 3, state="waiting")])
    scrape(evaluator)
    told = scrape(evaluator)
    assert told['preceptor_batches{state="waiting"}'] == 3
    assert told["preceptor_scrape_errors_total"] >= 1
    assert "preceptor_workers_alive" not in told


def test_an_occupied_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PreceptorError) as raised:
            m.PrometheusMetrics(m.WORKER, "127.0.0.1", taken.getsockname()[1])
    assert raised.value.reason == "PORT_IN_USE"


@pytest.mark.parametrize(
    ("missing", "settings", "variable"),
    [
        ("prometheus_client", {"metrics_port": 9464}, "PRECEPTOR_METRICS_PORT"),
        ("opentelemetry", {"otlp_endpoint": "http://127.0.0.1:9"}, "PRECEPTOR_OTLP_ENDPOINT"),
    ],
)
def test_a_missing_package_is_one_message_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, missing: str, settings: dict[str, object], variable: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(PreceptorError) as raised, telemetry("worker", HouseSettings(**settings)):  # type: ignore[arg-type]
        pytest.fail("it began")
    assert raised.value.reason == "EXTRA_MISSING"
    assert variable in raised.value.message
    assert raised.value.metadata["extra"] == "observability"


def test_off_is_nothing_and_nothing_is_imported_for_it() -> None:
    with telemetry("worker", HouseSettings()) as seen:
        assert seen is OFF
    code = "import sys, preceptor.launch, preceptor.server, preceptor.channel, orchestrator.sight; "
    code += "print([name for name in sys.modules if name.startswith(('prometheus_client', 'opentelemetry'))])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60, cwd=REPOSITORY).strip() == "[]"


def test_a_process_without_a_gpu_tells_nothing_of_one() -> None:
    assert list(m.gpu_memory()) == []


@pytest.mark.gpu
def test_the_memory_of_the_gpu_in_use_is_told() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    held = torch.zeros(2**20, device="cuda")
    told = {one.labels["kind"]: one.value for one in m.gpu_memory()}
    assert held.numel() * 4 <= told["allocated"] <= told["reserved"] <= told["used"] <= told["total"]


def test_a_process_that_has_ended_is_counted_as_down(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian: apt-get install prometheus)")
    (query,) = (query for query in dashboard_queries() if query.startswith("count(up == 0"))
    series = {**SERVICES_UP, 'up{job="worker",instance="a"}': 1, 'up{job="worker",instance="b"}': 0}
    del series['up{job="evaluator"}']
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": f"{value}x5"} for name, value in up.items()],
            "promql_expr_test": [{"expr": query, "eval_time": "3m", "exp_samples": [{"labels": "{}", "value": down}]}],
        }
        for up, down in ((series, 2), ({**SERVICES_UP, 'up{job="worker"}': 1}, 0))
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": tests}))
    said = subprocess.run(
        [promtool, "test", "rules", str(tmp_path / "test.yml")], capture_output=True, text=True, timeout=60
    )
    assert said.returncode == 0, said.stdout + said.stderr


def test_the_page_s_table_has_no_bar_in_a_cell() -> None:
    rows = [
        line
        for line in (REPOSITORY / "docs/observability.md").read_text().splitlines()
        if line.startswith("| `preceptor_")
    ]
    assert len(rows) == len(m.CATALOGUE)
    assert {row.count("|") for row in rows} == {6}
