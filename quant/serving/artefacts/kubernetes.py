"""A deployment in a cluster: plain Kubernetes objects, and those of KServe, LeaderWorkerSet, Ray Serve and
vLLM's production-stack."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from quant import defaults
from quant.errors import UsageError
from quant.serving.artefacts.base import (
    MOUNTED,
    PLATFORMS,
    Placement,
    container_words,
    head,
    kube_name,
    to_yaml,
)
from quant.serving.deployment import OFFLINE, Deployment
from quant.units import GIB

#: GiB of memory a container asks for beside the bytes of the checkpoint, which are read through its page
#: cache; and cores for each GPU: the API server, the engine, a worker.
_MEMORY, _CORES = 8, 4


def kubernetes(deployment: Deployment, placement: Placement) -> str:
    """A Deployment and a Service."""
    name = kube_name(deployment.name)
    # neither the wished host nor its warning has a meaning inside a cluster
    inside = replace(deployment, warnings=())
    return (
        head(
            inside,
            "Apply it with: kubectl apply -f FILE",
            *_notes(deployment, placement, name),
            contained=True,
        )
        + to_yaml(_workload(deployment, placement, name))
        + "---\n"
        + to_yaml(_service(deployment, name))
    )


def _notes(deployment: Deployment, placement: Placement, name: str) -> list[str]:
    where = (
        f"The claim {placement.claim} holds the checkpoint: kubectl cp it there first, or fill it by a job."
        if placement.claim
        else "Each node that may run it needs the checkpoint at the path of the volume; --claim NAME takes "
        "it from a PersistentVolumeClaim instead."
    )
    more = [where, "The Service is reachable inside the cluster only."]
    if deployment.api_key_env:
        more.append(
            f"The API key: kubectl create secret generic {name}-key "
            f'--from-literal=api-key="${deployment.api_key_env}"'
        )
    return more


def _workload(deployment: Deployment, placement: Placement, name: str) -> dict[str, Any]:
    """The Deployment object: one pod of :func:`_container`."""
    labels = _labels(name)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a rolling update would need a second set of GPUs
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(deployment, placement, [_container(deployment, placement, name)]),
            },
        },
    }


def _pod(deployment: Deployment, placement: Placement, containers: list[dict[str, Any]]) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "containers": containers,
        "enableServiceLinks": False,  # a service named vllm would set VLLM_PORT, which vLLM reads
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 60,
        "volumes": [_volume(deployment, placement), _SHARED_MEMORY],
    }
    resource = PLATFORMS[deployment.platform].resource
    if resource is not None:  # nodes with GPUs are often tainted for those who ask for one
        pod["tolerations"] = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    return pod


#: Ranks exchange through it; the default of a pod is 64 MiB.
_SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}


def _volume(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    if placement.claim is not None:
        return {
            "name": "model",
            "persistentVolumeClaim": {"claimName": placement.claim, "readOnly": True},
        }
    return {"name": "model", "hostPath": {"path": str(deployment.model_path), "type": "Directory"}}


def _container(deployment: Deployment, placement: Placement, name: str) -> dict[str, Any]:
    platform = PLATFORMS[deployment.platform]

    def probe(**seconds: int) -> dict[str, Any]:
        return {"httpGet": {"path": "/health", "port": "http"}, **seconds}

    return {
        "name": "vllm",
        "image": platform.image,
        "args": [_unexpanded(w) for w in container_words(deployment)],
        "env": _environment(deployment, name),
        "ports": [{"name": "http", "containerPort": defaults.PORT}],
        "startupProbe": probe(periodSeconds=10, failureThreshold=180),
        "readinessProbe": probe(periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe(periodSeconds=10, failureThreshold=6),
        "resources": _resources(deployment, placement),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": _mounts(placement),
    }


def _unexpanded(word: str) -> str:
    """A word in which the kubelet sees no $(NAME) to replace."""
    return word.replace("$(", "$$(")


def _environment(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    known = {**OFFLINE, **PLATFORMS[deployment.platform].environment}
    environment: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in known.items()]
    if deployment.api_key_env:
        secret = {"name": f"{name}-key", "key": "api-key"}
        environment.append({"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": secret}})
    return environment


def _resources(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    gpus = max(deployment.ranks // placement.nodes, 1)
    memory = _MEMORY + -(-deployment.checkpoint_bytes // GIB)
    if deployment.platform == "cpu":  # weights and cache are in the machine's memory
        memory += int(PLATFORMS["cpu"].environment["VLLM_CPU_KVCACHE_SPACE"])
    requests = {"cpu": str(_CORES * gpus), "memory": f"{memory}Gi"}
    resource = PLATFORMS[deployment.platform].resource
    return {"requests": requests, "limits": {resource: gpus}} if resource else {"requests": requests}


def _mounts(placement: Placement) -> list[dict[str, Any]]:
    model: dict[str, Any] = {"name": "model", "mountPath": MOUNTED, "readOnly": True}
    if placement.claim is not None and placement.path:
        model["subPath"] = placement.path
    return [model, {"name": "shm", "mountPath": "/dev/shm"}]


def _service(deployment: Deployment, name: str) -> dict[str, Any]:
    """The Service object, of the cluster's inside."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "type": "ClusterIP",
            "selector": _labels(name),
            "ports": [{"name": "http", "port": deployment.port, "targetPort": "http"}],
        },
    }


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name}


def leaderworkerset(deployment: Deployment, placement: Placement) -> str:
    """A LeaderWorkerSet (leaderworkerset.x-k8s.io/v1): one server on several nodes, by vLLM's own launcher of
    several nodes, and the Service of its leader.

    Raises:
        UsageError: fewer than two nodes, or GPUs that they cannot share evenly.
    """
    nodes, ranks = placement.nodes, deployment.ranks
    if nodes < 2 or ranks % nodes:
        raise UsageError(
            f"--nodes is {nodes} for {ranks} GPU{'s' * (ranks > 1)}: a LeaderWorkerSet takes two nodes or "
            "more that divide the GPUs (--tensor-parallel, or -- --pipeline-parallel-size N)"
        )
    name = kube_name(deployment.name)
    labels = _labels(name)
    # its controller replaces these in every pod; they must reach the kubelet unescaped
    group = ["--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", "$(LWS_WORKER_INDEX)"]
    group += ["--master-addr", "$(LWS_LEADER_ADDRESS)"]

    def template(role: str, *more: str) -> dict[str, Any]:
        container = _container(deployment, placement, name)
        container["args"] += [*group, *more]
        if role == "worker":  # it serves no port of its own
            for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe"):
                container.pop(key)
        return {
            "metadata": {"labels": {**labels, "role": role}},
            "spec": _pod(deployment, placement, [container]),
        }

    workload = {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "leaderWorkerTemplate": {
                "size": nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": template("leader"),
                "workerTemplate": template("worker", "--headless"),
            },
        },
    }
    service = _service(deployment, name)
    service["spec"]["selector"] = {**labels, "role": "leader"}
    return (
        head(
            replace(deployment, warnings=()),
            "Apply it with: kubectl apply -f FILE (the LeaderWorkerSet controller must be installed)",
            *_notes(deployment, placement, name),
            contained=True,
        )
        + to_yaml(workload)
        + "---\n"
        + to_yaml(service)
    )


def _flags_without(deployment: Deployment, *names: str) -> list[str]:
    """The flags of a deployment but for some that have a value each."""
    words, kept = iter(deployment.flags()), []
    for word in words:
        if word in names:
            next(words, None)
        else:
            kept.append(word)
    return kept


def kserve(deployment: Deployment, placement: Placement) -> str:
    """KServe's LLMInferenceService (serving.kserve.io/v1alpha1); the arguments of vLLM go through the
    variable that KServe's own template of a vLLM container reads.

    Raises:
        UsageError: no claim: KServe takes a model by a URI.
    """
    if placement.claim is None:
        raise UsageError(
            "--output kserve needs --claim NAME: KServe mounts a model from a PersistentVolumeClaim (pvc://)"
        )
    name = kube_name(deployment.name)
    uri = f"pvc://{placement.claim}/{placement.path}".rstrip("/")
    # KServe's template sets these itself
    kept = _flags_without(deployment, "--served-model-name", "--tensor-parallel-size", "--host", "--port")
    arguments = {"name": "VLLM_ADDITIONAL_ARGS", "value": shlex.join(kept)}
    container = {
        "name": "main",
        "image": PLATFORMS[deployment.platform].image,
        "env": [*_environment(deployment, name), arguments],
        "resources": _resources(deployment, placement),
    }
    resource = PLATFORMS[deployment.platform].resource
    spec: dict[str, Any] = {
        "model": {"uri": uri, "name": deployment.name},
        "replicas": 1,
        "parallelism": {"tensor": deployment.tensor_parallel},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": {"containers": [container]},
    }
    if resource is not None:
        spec["template"]["tolerations"] = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    return head(
        replace(deployment, warnings=()),
        "Apply it with: kubectl apply -f FILE (KServe 0.16 or newer with its LLMInferenceService)",
        *_notes(deployment, placement, name)[2:],
        contained=True,
    ) + to_yaml(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LLMInferenceService",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


def ray_serve(deployment: Deployment, placement: Placement) -> str:
    """A Ray Serve LLM application (``serve run FILE``); the engine's arguments are ``engine_kwargs``."""
    import yaml

    arguments = {a.name.replace("-", "_"): a.value for a in deployment.arguments}
    arguments.pop("served_model_name", None)
    words = list(deployment.extra)
    while words:
        key = words.pop(0).removeprefix("--").replace("-", "_")
        key, _, inline = key.partition("=")
        takes = words and not words[0].startswith("--")
        text = inline or (words.pop(0) if takes else "true")
        arguments[key] = yaml.safe_load(text)  # numbers and JSON as such: keys, not words of a command
    config = {
        "model_loading_config": {"model_id": deployment.name, "model_source": str(deployment.model_path)},
        "engine_kwargs": arguments,
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        "runtime_env": {"env_vars": OFFLINE},
    }
    application = {
        "name": kube_name(deployment.name),
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }
    said = (
        "Run it with: serve run FILE (pip install 'ray[serve,llm]'); every node needs the path of the model."
    )
    http = {"host": deployment.host, "port": deployment.port}
    return head(deployment, said) + to_yaml({"http_options": http, "applications": [application]})


def production_stack(deployment: Deployment, placement: Placement) -> str:
    """Values of vLLM's production-stack chart (``helm install NAME vllm/vllm-stack -f FILE``)."""
    name = kube_name(deployment.name)
    platform = PLATFORMS[deployment.platform]
    resources = _resources(deployment, placement)
    extra = _flags_without(deployment, "--host", "--port")
    model: dict[str, Any] = {
        "name": name,
        "repository": platform.repository,
        "tag": platform.tag,
        "modelURL": MOUNTED,
        "replicaCount": 1,
        "requestCPU": int(resources["requests"]["cpu"]),
        "requestMemory": resources["requests"]["memory"],
        "requestGPU": next(iter(resources.get("limits", {}).values()), 0),
        "vllmConfig": {"extraArgs": extra},
        "extraVolumes": [_volume(deployment, placement)],
        "extraVolumeMounts": _mounts(placement)[:1],
        "env": [{"name": k, "value": v} for k, v in OFFLINE.items()],
    }
    if platform.resource not in (None, "nvidia.com/gpu"):
        model["requestGPUType"] = platform.resource
    spec: dict[str, Any] = {"runtimeClassName": "", "modelSpec": [model]}
    if deployment.api_key_env:
        spec["vllmApiKey"] = {"secretName": f"{name}-key", "secretKey": "api-key"}
    return head(
        replace(deployment, warnings=()),
        "helm repo add vllm https://vllm-project.github.io/production-stack; "
        "helm install NAME vllm/vllm-stack -f FILE",
        *_notes(deployment, placement, name),
    ) + to_yaml({"servingEngineSpec": spec})
