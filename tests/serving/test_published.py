"""Every generated file, as its own tool or published schema takes it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quant.errors import UsageError
from quant.serving.artefacts import KINDS, Placement, artefact
from quant.serving.deployment import Deployment, DeploymentRequest
from quant.serving.engines import plan
from tests.helpers import ROOT
from tests.serving import published

jsonschema = pytest.importorskip("jsonschema")
#: Kind → the facts that each of its objects is held against, in their order; None: Kubernetes' own schemas.
HELD: dict[str, list[dict[str, Any] | None]] = {
    "compose": [published.COMPOSE],
    "kubernetes": [None, None],
    "leaderworkerset": [published.LEADER_WORKER_SET, None],
    "kserve": [published.LLM_INFERENCE_SERVICE],
    "ray-serve": [published.RAY_SERVE],
    "ray-service": [published.RAY_SERVICE],
    "production-stack": [published.PRODUCTION_STACK],
    "monitoring": [published.POD_MONITOR, published.PROMETHEUS_RULE, None],
    "alerts": [published.RULE_FILE],
    "dashboard": [published.DASHBOARD],
}
#: Whose application checks no key.
RAY = ("ray-serve", "ray-service")
GPUS = (None, "2xL40S-48GB", "2xMI300X", "cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(
        shutil.copytree(ROOT / "examples/tinylm-4m", tmp_path_factory.mktemp("m") / "a $model's (v1)")
    )


def deployment(source: Path, gpu: str | None, key: bool = True) -> Deployment:
    ranks = 2 if gpu != "cpu" else None
    asked = DeploymentRequest(
        gpu=gpu, tensor_parallel=ranks, max_num_seqs=8, api_key_env="KEY" if key else None
    )
    return plan(source, asked)


def objects(made: Deployment, kind: str) -> list[dict[str, Any]]:
    cluster = kind in ("kubernetes", "leaderworkerset", "kserve", "production-stack", "ray-service")
    placement = Placement(
        claim="models" if cluster else None,
        path="llama/8b" if cluster else "",
        nodes=2 if kind == "leaderworkerset" else 1,
        price=2.5 if kind in ("dashboard", "monitoring") else None,
    )
    text = artefact(made, kind, placement)
    return [json.loads(text)] if kind == "dashboard" else list(yaml.safe_load_all(text))


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Specs of the pods inside an object of another API."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("leaderTemplate", "workerTemplate") or key == "template" and "spec" in inner:
                yield inner["spec"]
            else:
                yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def test_every_kind_is_held_against_something() -> None:
    assert set(KINDS) == {*HELD, "shell", "systemd", "modelfile"}  # those have tests of their own


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("kind", HELD)
def test_a_file_has_what_its_publisher_says(kind: str, gpu: str | None, source: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    if kind == "leaderworkerset" and gpu == "cpu":
        pytest.skip("a CPU has no second node here")
    made = deployment(source, gpu, key=kind not in RAY)
    if kind == "ray-service" and gpu in ("2xMI300X", "cpu"):
        with pytest.raises(UsageError, match="for NVIDIA's GPUs"):
            objects(made, kind)
        return
    found = objects(made, kind)
    assert len(found) == len(HELD[kind])
    for value, facts in zip(found, HELD[kind], strict=True):
        if facts is None:
            kubernetes_validate.validate(value, "1.31", strict=True)
        else:
            jsonschema.validate(value, published.schema(facts))
        for spec in pods(value):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
            kubernetes_validate.validate(pod, "1.31", strict=True)


@pytest.mark.parametrize("kind", HELD)
def test_the_facts_see_a_word_that_is_none(kind: str, source: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for value, facts in zip(
        objects(deployment(source, "2xL40S-48GB", key=kind not in RAY), kind), HELD[kind], strict=True
    ):
        wrong = copy.deepcopy(value)
        wrong["shmSizes"] = "8Gi"
        if facts is not None:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(wrong, published.schema(facts))
        else:
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(wrong, "1.31", strict=True)


@pytest.mark.parametrize("kind", ["compose", "alerts", "systemd", "shell"])
def test_a_tool_that_is_here_takes_its_file(kind: str, source: Path, tmp_path: Path) -> None:
    """``docker compose config``, ``promtool check rules``, ``systemd-analyze verify``, ``sh -n``."""
    file = tmp_path / f"vllm-model.{'service' if kind == 'systemd' else 'yaml'}"
    file.write_text(artefact(deployment(source, "2xL40S-48GB"), kind))
    commands = {
        "compose": ["docker", "compose", "-f", str(file), "config", "--quiet"],
        "alerts": ["promtool", "check", "rules", str(file)],
        "systemd": ["systemd-analyze", "verify", str(file)],
        "shell": ["sh", "-n", str(file)],
    }
    command = commands[kind]
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not here")
    if kind == "compose" and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker has no compose here")
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "KEY": "k"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    told = [line for line in done.stderr.splitlines() if file.name in line and "EnvironmentFile" not in line]
    assert not told if kind == "systemd" else done.returncode == 0, done.stderr


def test_a_pod_is_what_a_cluster_admits(source: Path) -> None:
    """Pod Security Standards' restricted profile, and what a server of hours of work needs."""
    workload, _ = objects(deployment(source, "2xL40S-48GB"), "kubernetes")
    spec = workload["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    security = container["securityContext"]
    assert security["runAsNonRoot"] and security["runAsUser"] == 2000 and security["runAsGroup"] == 0
    assert security["capabilities"] == {"drop": ["ALL"]} and not security["allowPrivilegeEscalation"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    environment = {e["name"]: e for e in container["env"]}
    # that user's own home, and a cache that is writable
    assert environment["HOME"]["value"] == "/home/vllm"
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts["cache"] == "/home/vllm/.cache" and mounts["shm"] == "/dev/shm"
    # requests under way end before the pod is killed: preStop, draining, and the engine's own end
    drain = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= drain + wait + 20
    assert "KEY" not in json.dumps(container["args"]) and not container["image"].endswith(":latest")
    # the plan is for this GPU
    assert spec["nodeSelector"]["nvidia.com/gpu.compute.major"] == "8"
    assert spec["affinity"]["nodeAffinity"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 2


@pytest.mark.parametrize(
    ("kind", "placement", "said"),
    [
        ("kubernetes", {"claim": ""}, "--claim is ''"),
        ("kubernetes", {"claim": "My Claim"}, "--claim is 'My Claim'"),
        ("kubernetes", {"claim": "models", "path": "a/../../b"}, "without .."),
        ("kubernetes", {"path": "a"}, "give --claim NAME too"),
        ("kubernetes", {"nodes": 2}, "--nodes has no use in --output kubernetes"),
        ("shell", {"claim": "models"}, "--claim has no use in --output shell"),
        ("dashboard", {"price": float("nan")}, "--price-per-hour is nan"),
        ("alerts", {"profile": "chatty"}, "--profile is 'chatty'"),
    ],
)
def test_a_placement_that_a_file_cannot_take_is_refused(
    kind: str, placement: dict[str, Any], said: str, source: Path
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        artefact(deployment(source, None), kind, Placement(**placement))


def test_a_ray_service_runs_the_application_of_ray_serve_on_its_cluster(source: Path) -> None:
    made = deployment(source, "2xL40S-48GB", key=False)
    (value,) = yaml.safe_load_all(artefact(made, "ray-service", Placement(claim="models", nodes=2)))
    (alone,) = yaml.safe_load_all(artefact(made, "ray-serve"))
    inside = yaml.safe_load(value["spec"]["serveConfigV2"])
    jsonschema.validate(inside, published.schema(published.RAY_SERVE))
    (config,), (other,) = (v["applications"][0]["args"]["llm_configs"] for v in (inside, alone))
    assert config["engine_kwargs"] == other["engine_kwargs"]
    cluster = value["spec"]["rayClusterConfig"]
    main, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    held, worker = (p["template"]["spec"]["containers"][0] for p in (main, group))
    assert group["replicas"] == group["maxReplicas"] == 2
    assert (
        worker["resources"]["limits"] == {"nvidia.com/gpu": 1} and "nodeSelector" in group["template"]["spec"]
    )
    assert "nvidia.com/gpu" not in held["resources"]["limits"]
    assert "nodeSelector" not in main["template"]["spec"]
    places = {m["name"]: m["mountPath"] for m in worker["volumeMounts"]}
    assert config["model_loading_config"]["model_source"] == places["model"]
    assert places["cache"] == "/home/ray/.cache" and worker["securityContext"]["runAsUser"] == 1000
    for nodes, key, said in ((3, False, "--nodes is 3 for 2 GPUs"), (1, True, "checks no key")):
        with pytest.raises(UsageError, match=said):
            artefact(deployment(source, "2xL40S-48GB", key), "ray-service", Placement(nodes=nodes))


def test_amds_devices_are_open_to_the_user_of_the_unit(source: Path) -> None:
    line = "SupplementaryGroups=video render"
    assert line in artefact(deployment(source, "2xMI300X"), "systemd")
    assert line not in artefact(deployment(source, "2xL40S-48GB"), "systemd")


def test_a_start_may_take_as_long_as_reading_the_weights(source: Path) -> None:
    from dataclasses import replace

    made = deployment(source, "2xL40S-48GB")
    small, large = made, replace(made, checkpoint_bytes=400 * 10**9)

    def seconds(one: Deployment) -> int:
        (container,) = objects(one, "kubernetes")[0]["spec"]["template"]["spec"]["containers"]
        probe = container["startupProbe"]
        return int(probe["periodSeconds"] * probe["failureThreshold"])

    assert 600 <= seconds(small) < 700 and seconds(large) >= 600 + 2000
    (service,) = yaml.safe_load(artefact(large, "compose"))["services"].values()
    assert service["healthcheck"]["start_period"] == "2600s"


def test_production_stack_keeps_prefix_caching_and_shares_memory_among_ranks(source: Path) -> None:
    """Its chart passes --no-enable-prefix-caching where the value is missing, and mounts /dev/shm where
    tensorParallelSize is set."""
    (values,) = objects(deployment(source, "2xL40S-48GB"), "production-stack")
    (model,) = values["servingEngineSpec"]["modelSpec"]
    config = model["vllmConfig"]
    assert config["enablePrefixCaching"] is True and config["tensorParallelSize"] == 2
    assert "--tensor-parallel-size" not in config["extraArgs"]
    # its chart leaves Kubernetes' 30 s
    drain = config["extraArgs"]
    assert int(drain[drain.index("--shutdown-timeout") + 1]) < 30


def test_kserves_template_is_merged_with_a_user_that_is_not_root(source: Path) -> None:
    (service,) = objects(deployment(source, "2xL40S-48GB"), "kserve")
    (main,) = service["spec"]["template"]["containers"]
    assert main["securityContext"]["runAsUser"] == 2000  # its template has runAsNonRoot, the image is root's
    assert set(main["startupProbe"]) == {
        "failureThreshold"
    }  # the address is the template's, which may be TLS


def test_alerts_have_the_limits_of_a_profile_and_watch_their_own_server(source: Path) -> None:
    made = deployment(source, None)

    def rules(profile: str) -> dict[str, str]:
        (file,) = yaml.safe_load_all(artefact(made, "alerts", Placement(profile=profile)))
        return {r["alert"]: r["expr"] for g in file["groups"] for r in g["rules"]}

    chat, batch = rules("chat"), rules("batch")
    assert chat["VllmSlowFirstToken"].endswith("> 0.5") and chat["VllmSlowFirstTokenP99"].endswith("> 3")
    assert chat["VllmSlowTokens"].endswith("> 0.0333") and "VllmSlowBatch" not in chat
    assert batch["VllmSlowFirstToken"].endswith("> 2") and "< 1000" in batch["VllmSlowBatch"]
    # the series of HTTP errors has no model: other services of the Prometheus must not ring
    assert chat["VllmErrors"].count("and on (job, instance) vllm:num_requests_running") == 2
