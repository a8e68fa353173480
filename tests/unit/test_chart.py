"""The Helm chart: what it renders is valid Kubernetes, and says what the processes read.

No cluster is asked. Rendered objects are validated against Kubernetes' own schemas (kubernetes-validate); KEDA's kind
is not among them and is compared with ``SCALED_OBJECT``, the part of its schema that the chart uses.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from evaluator.lanes import Lanes
from evaluator.settings import EvaluatorSettings
from orchestrator.settings import OrchestratorSettings
from preceptor.cli.probe import probe
from preceptor.metrics import CATALOGUE
from preceptor.queue import served_queues
from preceptor.settings import HouseSettings, ServiceSettings
from student.settings import StudentSettings, WorkerSettings
from student.trial_worker import STOP_SECONDS
from teacher.settings import TeacherSettings

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy" / "helm" / "preceptor"
FILES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
# The oldest that the chart takes and kubernetes-validate knows, and a new one.
OLDEST, NEWEST = "1.27", "1.36"
SETTINGS: dict[str, type[HouseSettings]] = {
    "teacher": TeacherSettings,
    "student": StudentSettings,
    "evaluator": EvaluatorSettings,
    "orchestrator": OrchestratorSettings,
    "worker": WorkerSettings,
}
# Variables of others: Hugging Face's, AWS's, vLLM's and what its caches need.
FOREIGN = re.compile(r"HF_(HOME|TOKEN_PATH|HUB_OFFLINE)|AWS_(ENDPOINT_URL|SHARED_CREDENTIALS_FILE|REGION)")
OF_VLLM = re.compile(FOREIGN.pattern + r"|VLLM_\w+|HOME|USER|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR|DO_NOT_TRACK")
SCALED_OBJECT = {
    "type": "object",
    "additionalProperties": False,
    "required": ["scaleTargetRef", "triggers"],
    "properties": {
        "scaleTargetRef": {
            "type": "object", "required": ["name"], "additionalProperties": False, "properties": {"name": {}},
        },
        **{
            name: {"type": "integer", "minimum": 0}
            for name in ("minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod")
        },
        "advanced": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "horizontalPodAutoscalerConfig": {
                    "type": "object", "additionalProperties": False, "properties": {"behavior": {"type": "object"}},
                }
            },
        },
        "triggers": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["type", "metadata"],
                "properties": {
                    "type": {"const": "metrics-api"},
                    "metadata": {
                        "type": "object",
                        "required": ["url", "format", "valueLocation", "targetValue"],
                        "additionalProperties": {"type": "string"},  # KEDA refuses numbers
                    },
                },
            },
        },
    },
}  # fmt: skip


def helm() -> str:
    own = Path(sys.executable).with_name("helm")
    found = str(own) if own.exists() else shutil.which("helm")
    if not found:
        pytest.skip("helm is not installed (helm-binary, in the extra dev)")
    return found


def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([helm(), *arguments], capture_output=True, text=True, timeout=60)


@functools.cache
def rendered(values: str, *sets: str) -> tuple[dict[str, Any], ...]:
    more = [word for one in sets for word in ("--set", one)]
    done = run_helm("template", "mine", str(CHART), "--namespace", "lab", "-f", str(FILES[values]), *more)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.safe_load_all(done.stdout) if one)


VARIANTS: list[tuple[str, ...]] = [
    ("small",),
    ("full",),
    ("small", "metrics.enabled=false", "networkPolicy.enabled=false"),
    ("small", "security.tokenSecret.name=t"),
    ("full", "security.tlsSecret=", "hub.cacheClaim=", "models.claim=", "hub.offline=true", "hub.tokenSecret.name="),
    ("full", "artifacts.url=", "artifacts.claim=weights", "vllm.policiesClaim="),
    ("full", "vllm.enabled=false", "redis.passwordSecret.name=", "postgres.passwordSecret.name="),
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids="+".join)


def of_kind(variant: tuple[str, ...], kind: str) -> list[dict[str, Any]]:
    return [one for one in rendered(*variant) if one["kind"] == kind]


def component(one: dict[str, Any]) -> str:
    return str(one["metadata"]["labels"]["app.kubernetes.io/component"])


def process(deployment: dict[str, Any]) -> str:
    """teacher, ..., worker, vllm."""
    return component(deployment).partition("-")[0]


def pod(deployment: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return made


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(deployment)["containers"]
    made: dict[str, Any] = only
    return made


def environment(deployment: dict[str, Any]) -> dict[str, str]:
    entries = container(deployment)["env"]
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    assert all(set(entry) == {"name", "value"} and isinstance(entry["value"], str) for entry in entries)
    return {entry["name"]: entry["value"] for entry in entries}


def test_workers_can_write_where_the_evaluator_looks_for_kept_edits() -> None:
    variant = ("full", "artifacts.url=", "artifacts.claim=weights", "vllm.policiesClaim=")
    found = {process(one): one for one in of_kind(variant, "Deployment") + of_kind(variant, "StatefulSet")}
    for name in ("teacher", "evaluator", "worker"):
        place = environment(found[name])["PRECEPTOR_ARTIFACTS_URL"]
        (mount,) = (one for one in container(found[name])["volumeMounts"] if one["mountPath"] == place)
        assert not mount.get("readOnly")
        (volume,) = (one for one in pod(found[name])["volumes"] if one["name"] == mount["name"])
        assert volume["persistentVolumeClaim"] == {"claimName": "weights"}


def secret_files(deployment: dict[str, Any]) -> set[str]:
    """Every file that a Secret's key is mounted at; of whole Secrets only the folder, with a star."""
    sources = {volume["name"]: volume for volume in pod(deployment)["volumes"]}
    found = set()
    for mount in container(deployment)["volumeMounts"]:
        volume = sources[mount["name"]]
        for source in volume.get("projected", {}).get("sources", ()):
            found |= {f"{mount['mountPath']}/{item['path']}" for item in source["secret"]["items"]}
        if "secret" in volume:
            found.add(f"{mount['mountPath']}/*")
    return found


@pytest.mark.parametrize("values", FILES)
def test_helm_has_nothing_to_complain_of(values: str) -> None:
    done = run_helm("lint", "--strict", "--quiet", str(CHART), "-f", str(FILES[values]))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "variant"), [(NEWEST, one) for one in VARIANTS] + [(OLDEST, one) for one in VARIANTS[:2]]
)
def test_every_object_is_valid_kubernetes(version: str, variant: tuple[str, ...]) -> None:
    for one in rendered(*variant):
        if one["apiVersion"] == "keda.sh/v1alpha1":
            jsonschema.validate(one["spec"], SCALED_OBJECT)
            kubernetes_validate.validate(autoscaler(one["spec"]), version, strict=True)
        else:
            kubernetes_validate.validate(one, version, strict=True)


def autoscaler(scaled: dict[str, Any]) -> dict[str, Any]:
    """The part of a ScaledObject that KEDA hands on to Kubernetes as it is."""
    behavior = scaled["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", **scaled["scaleTargetRef"]}
    spec = {"scaleTargetRef": target, "maxReplicas": scaled["maxReplicaCount"], "behavior": behavior}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "x"}, "spec": spec}


@every_variant
def test_no_two_objects_have_one_name(variant: tuple[str, ...]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in rendered(*variant)]
    assert len(names) == len(set(names))
    assert all(len(name) <= 63 for _, name in names)


@every_variant
def test_every_variable_is_a_setting_and_all_settings_can_be_read(
    variant: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for deployment in of_kind(variant, "Deployment"):
        values, who = environment(deployment), process(deployment)
        ours = {name: value for name, value in values.items() if name.startswith("PRECEPTOR_")}
        allowed = OF_VLLM if who == "vllm" else FOREIGN
        for name in values.keys() - ours.keys():
            assert allowed.fullmatch(name), f"{who}: {name}"
        if who == "vllm":
            assert not ours
            continue
        settings = SETTINGS[who]
        for name in ours:
            assert name.removeprefix("PRECEPTOR_").lower() in settings.model_fields, f"{who}: {name}"
        with monkeypatch.context() as patch:
            for name, value in ours.items():
                if value.startswith("/run/secrets/"):
                    file = tmp_path / value.strip("/")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    if name != "PRECEPTOR_TLS":
                        file.write_text("secret\n")
                    value = str(file)
                patch.setenv(name, value)
            read = settings()
        if isinstance(read, ServiceSettings):
            assert read.host == "0.0.0.0"
            assert read.database(who).startswith("postgresql+psycopg://preceptor")
            if "postgres.passwordSecret.name=" not in variant and variant[0] == "full":
                assert ":secret@" in read.database(who)
                assert ":secret@" in read.broker_url


@every_variant
def test_addresses_lead_to_services_that_lead_to_pods(variant: tuple[str, ...]) -> None:
    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(variant, "Service")}
    deployments = of_kind(variant, "Deployment")
    for name, service in services.items():
        selector = service["selector"].items()
        (behind,) = [one for one in deployments if selector <= one["spec"]["template"]["metadata"]["labels"].items()]
        ports = {port["name"]: port["containerPort"] for port in container(behind)["ports"]}
        for port in service["ports"]:
            assert ports[port["targetPort"]] == port["port"], name
    for deployment in deployments:
        for name, value in environment(deployment).items():
            address = re.fullmatch(r"(?:http://)?(mine-[a-z-]+):(\d+)(?:/.*)?", value)
            assert not name.endswith("_ADDRESS") or address
            if address:
                assert int(address[2]) in [port["port"] for port in services[address[1]]["ports"]], name


@every_variant
def test_every_secret_is_named_by_the_values_and_mounted_as_a_file(variant: tuple[str, ...]) -> None:
    values = yaml.safe_load(FILES[variant[0]].read_text())
    named = set(re.findall(r"'(?:name|tlsSecret)': '([^']+)'", str(values))) | {"t"}
    for deployment in of_kind(variant, "Deployment"):
        for volume in pod(deployment)["volumes"]:
            sources = [one["secret"]["name"] for one in volume.get("projected", {}).get("sources", ())]
            assert {*sources, *([volume["secret"]["secretName"]] if "secret" in volume else [])} <= named
        mounted = secret_files(deployment)
        for name, value in environment(deployment).items():
            if value.startswith("/run/secrets/"):
                assert value in mounted or f"{value}/*" in mounted, name
        assert all("valueFrom" not in entry for entry in container(deployment)["env"])


@every_variant
def test_nothing_that_is_rendered_holds_a_secret(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        for name, value in environment(deployment).items():
            assert not re.search(r"//[^/@]*:[^/@]*@", value), name
            if re.search(r"PASSWORD|TOKEN|KEY|SECRET", name):
                assert name.endswith(("_FILE", "_PATH")), name
    assert not of_kind(variant, "Secret")


@every_variant
def test_images_are_targets_of_the_dockerfile(variant: tuple[str, ...]) -> None:
    targets = re.findall(r"^FROM .* AS (\S+)", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    for deployment in of_kind(variant, "Deployment"):
        if process(deployment) != "vllm":
            name, _, tag = container(deployment)["image"].rpartition("/")[2].partition(":")
            assert name == f"preceptor-{process(deployment)}"
            assert name.removeprefix("preceptor-") in targets
            assert tag


@every_variant
def test_what_owns_a_database_is_never_two(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        if process(deployment) == "worker":
            continue
        assert deployment["spec"]["replicas"] == 1
        assert deployment["spec"]["strategy"] == {"type": "Recreate"}


@every_variant
def test_probes_ask_what_answers(variant: tuple[str, ...]) -> None:
    choices = set(next(one for one in probe.params if one.name == "process").type.choices)  # type: ignore[attr-defined]
    for deployment in of_kind(variant, "Deployment"):
        made, who = container(deployment), process(deployment)
        ports = {port["containerPort"] for port in made.get("ports", ())}
        probes = {kind: made[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness") if f"{kind}Probe" in made}
        if who == "worker":
            assert set(probes) == {"readiness"}  # while Redis is away it must live
        else:
            assert set(probes) == {"startup", "readiness", "liveness"}
        mutual_tls = "PRECEPTOR_TLS" in environment(deployment)
        for one in probes.values():
            if who == "vllm":
                assert one["httpGet"] == {"path": "/health", "port": "http"}
            elif who == "worker" or mutual_tls:
                assert one["exec"]["command"] == ["preceptor", "probe", who]
                assert who in choices
            else:
                assert one["grpc"]["port"] in ports
                assert str(one["grpc"]["port"]) == environment(deployment)["PRECEPTOR_PORT"]


@every_variant
def test_a_pod_has_the_time_that_its_process_takes_to_end(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        grace = pod(deployment)["terminationGracePeriodSeconds"]
        if process(deployment) == "worker":
            assert grace > STOP_SECONDS
        elif process(deployment) != "vllm":
            assert grace > ServiceSettings.model_fields["grace_seconds"].default + 5


@every_variant
def test_no_pod_has_a_right_that_it_does_not_need(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        spec, made = pod(deployment), container(deployment)
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False  # PRECEPTOR_TEACHER_PORT=tcp://..., VLLM_PORT
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert made["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        assert made["resources"]["requests"]["cpu"]
        assert made["resources"]["limits"]["memory"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all("hostPath" not in volume for volume in spec["volumes"])


@every_variant
def test_every_mount_has_its_volume_and_every_writable_path_one(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        volumes = [volume["name"] for volume in pod(deployment)["volumes"]]
        mounts = {mount["mountPath"]: mount["name"] for mount in container(deployment)["volumeMounts"]}
        assert len(volumes) == len(set(volumes))
        assert len(mounts) == len(container(deployment)["volumeMounts"])
        assert set(mounts.values()) == set(volumes)
        assert "/tmp" in mounts
        values = environment(deployment)
        for folder in (values.get("PRECEPTOR_HOME"), values.get("HOME"), values.get("HF_HOME")):
            assert folder is None or any(f"{folder}/".startswith(f"{path}/") for path in mounts)


@every_variant
def test_workers_have_one_gpu_each_or_none(variant: tuple[str, ...]) -> None:
    for deployment in of_kind(variant, "Deployment"):
        if process(deployment) == "worker":
            gpus = container(deployment)["resources"]["limits"].get("nvidia.com/gpu", 0)
            assert gpus == (1 if variant[0] == "full" else 0)
            assert environment(deployment)["PRECEPTOR_DEVICE"] == ("cuda" if gpus else "cpu")
            assert deployment["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == 0


def test_groups_of_workers_follow_the_queues_that_they_take_from() -> None:
    deployments = {one["metadata"]["name"]: one for one in of_kind(("full",), "Deployment")}
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"] for one in of_kind(("full",), "ScaledObject")}
    (evaluator,) = [one for one in deployments.values() if process(one) == "evaluator"]
    dedicated = environment(evaluator)["PRECEPTOR_DEDICATED_STUDENTS"].split(",")
    assert dedicated == ["small-one", "small-two"]
    metrics = {one.name for one in CATALOGUE}
    queues = set()
    for name, spec in scaled.items():
        assert "replicas" not in deployments[name]["spec"]
        served = environment(deployments[name]).get("PRECEPTOR_STUDENTS", "")
        mine = set()
        for trigger in spec["triggers"]:
            about = trigger["metadata"]
            assert about["url"] == "http://mine-preceptor-evaluator.lab.svc:9464/metrics"
            match = re.fullmatch(r'(\w+)\{queue="([^"]+)"\}', about["valueLocation"])
            assert match
            assert match[1] in metrics
            mine.add(match[2])
        assert mine == set(served_queues([one for one in served.split(",") if one]))
        queues |= mine
    assert queues == {lane.queue for lane in Lanes(dedicated)}  # none that nobody serves
    limits = {name[-4:]: (spec["minReplicaCount"], spec["maxReplicaCount"]) for name, spec in scaled.items()}
    assert limits == {"h100": (0, 64), "l40s": (1, 4)}


@pytest.mark.parametrize("artifacts", ["bucket", "claim"])
def test_the_teachers_server_sees_policies_where_the_teacher_writes_them(artifacts: str) -> None:
    sets = () if artifacts == "bucket" else ("artifacts.url=", "artifacts.claim=weights", "vllm.policiesClaim=")
    made = {process(one): one for one in of_kind(("full", *sets), "Deployment")}
    values = environment(made["teacher"])
    read = HouseSettings(home=values["PRECEPTOR_HOME"], artifacts_url=values["PRECEPTOR_ARTIFACTS_URL"])
    folder = str(read.artifact_cache._folder) if artifacts == "bucket" else read.artifacts
    for who, read_only in (("teacher", False), ("vllm", True)):
        mounts = {mount["mountPath"]: mount for mount in container(made[who])["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod(made[who])["volumes"]}
        claim = volumes[mounts[folder]["name"]]["persistentVolumeClaim"]["claimName"]
        assert claim == ("preceptor-policies" if artifacts == "bucket" else "weights")
        assert mounts[folder].get("readOnly", False) is read_only
    command = container(made["vllm"])["args"]
    assert f"--served-model-name={values['PRECEPTOR_TEACHER_SERVER_MODEL']}" in command
    assert f"--max-loras={values['PRECEPTOR_TEACHER_SERVER_ADAPTERS']}" in command
    assert values["PRECEPTOR_TEACHER_SOURCE"] in command
    assert f"--revision={values['PRECEPTOR_TEACHER_REVISION']}" in command


def test_only_who_calls_may_reach_a_service() -> None:
    policies = {component(one): one["spec"] for one in of_kind(("full",), "NetworkPolicy")}
    ports = {component(one): one["spec"]["ports"][0]["port"] for one in of_kind(("full",), "Service")}
    assert set(policies) == {"all", *ports}
    for who, port in ports.items():
        (rule,) = policies[who]["ingress"]
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]
        assert rule["from"]
        assert all("podSelector" in peer or "namespaceSelector" in peer for peer in rule["from"])
    (rule,) = policies["all"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [9464]
    assert "app.kubernetes.io/component" not in policies["all"]["podSelector"]["matchLabels"]  # all pods


def refusals() -> Iterator[tuple[tuple[str, ...], str]]:
    yield ("redis.url=",), "redis.url is needed"
    yield ("postgres.url=",), "postgres.url is needed"
    yield ("redis.url=redis://:pass@redis:6379/0",), "redis.url holds a password"
    yield ("postgres.url=postgresql://me:pass@db/x",), "postgres.url holds a password"
    yield ("artifacts.url=",), "one of artifacts.url"
    yield ("artifacts.claim=x",), "one of artifacts.url"
    yield ("artifacts.url=file:///x",), "artifacts.url"
    yield ("workers[1].name=h100",), "two groups of workers are called h100"
    yield ("workers[0].gpus=2",), "gpus"
    yield ("workers[0].autoscaling.minReplicas=100",), "minReplicas is above"
    yield ("metrics.enabled=false",), "autoscaling reads the evaluator's metrics"
    yield ("vllm.policiesClaim=",), "vllm.policiesClaim is needed"
    yield ("vllm.model=",), "vllm.model is needed"
    yield ("services.teacher.replicas=2",), "replicas"
    yield ("env.PRECEPTOR_TOKEN=x",), "PRECEPTOR_TOKEN"
    yield ("services.evaluator.env.PRECEPTOR_JUDGE_API_KEY=x",), "PRECEPTOR_JUDGE_API_KEY"
    yield ("worker.replicas=2",), "worker"


@pytest.mark.parametrize(("sets", "said"), list(refusals()), ids=lambda value: str(value)[:50])
def test_what_cannot_be_is_refused_before_it_is_installed(sets: tuple[str, ...], said: str) -> None:
    more = [word for one in sets for word in ("--set", one)]
    done = run_helm("template", "mine", str(CHART), "-f", str(FILES["full"]), *more)
    assert done.returncode != 0
    assert said in done.stderr


def test_numbers_in_the_environment_stay_numbers() -> None:
    sets = ("services.evaluator.env.PRECEPTOR_MAX_WAITING=2000000", "env.PRECEPTOR_MAX_STREAMS=1000000")
    (evaluator,) = [one for one in of_kind(("full", *sets), "Deployment") if process(one) == "evaluator"]
    values = environment(evaluator)
    assert values["PRECEPTOR_MAX_WAITING"] == "2000000"
    assert values["PRECEPTOR_MAX_STREAMS"] == "1000000"
    assert values["PRECEPTOR_BATCHES_IN_FLIGHT"] == "512"


def test_the_notes_name_what_was_installed(tmp_path: Path) -> None:
    """Helm shows notes only where there is a cluster; so a copy of the chart renders them as an object."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    notes = chart / "templates" / "NOTES.txt"
    (chart / "templates" / "_notes.tpl").write_text(f'{{{{ define "notes" }}}}{notes.read_text()}{{{{ end }}}}')
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | quote }}\n')
    notes.unlink()
    done = run_helm("template", "mine", str(chart), "-f", str(FILES["full"]), "--show-only", "templates/notes.yaml")
    assert done.returncode == 0, done.stderr
    said = yaml.safe_load(done.stdout)["notes"]
    assert "port-forward service/mine-preceptor-orchestrator 7104" in said
    assert "go-template='{{ index .data \"token\" | base64decode }}' > token" in said
    assert "Workers h100: 0 to 64" in said
    assert "mine-preceptor-evaluator mine-preceptor-orchestrator" in said  # what the certificate must name


def test_every_value_is_described_by_the_schema_and_the_readme_names_the_top_ones() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    readme = (CHART / "README.md").read_text()
    for name in values:
        assert f"`{name}" in readme, name
