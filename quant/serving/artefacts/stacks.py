"""A deployment on stacks above Kubernetes: LeaderWorkerSet, KServe and vLLM's production-stack. They run
vLLM alone."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from quant.errors import UsageError
from quant.serving.artefacts import kubernetes as kube
from quant.serving.artefacts.base import (
    GRACE,
    MOUNTED,
    PLATFORMS,
    SHARED_MEMORY,
    Placement,
    drain_words,
    head,
    image,
    kube_name,
    start_seconds,
    to_yaml,
)
from quant.serving.deployment import Deployment

#: Seconds that production-stack's pods get to end: Kubernetes' own, which its chart leaves.
_CHART_GRACE = 30


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
    name = kube_name(deployment)
    labels = kube.labels(name)
    # its controller replaces these in every pod; they must reach the kubelet unescaped
    group = ["--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", "$(LWS_WORKER_INDEX)"]
    group += ["--master-addr", "$(LWS_LEADER_ADDRESS)"]

    def template(role: str, *more: str) -> dict[str, Any]:
        container = kube.container(deployment, placement, name)
        container["args"] += [*group, *more]
        if role == "worker":  # it serves no port of its own
            for key in ("ports", "startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
                container.pop(key)
        return {
            "metadata": {"labels": {**labels, "role": role}},
            "spec": kube.pod(deployment, placement, [container]),
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
    service = kube.service(deployment, name)
    service["spec"]["selector"] = {**labels, "role": "leader"}
    return (
        head(
            replace(deployment, warnings=()),
            "Apply it with: kubectl apply -f FILE (the LeaderWorkerSet controller must be installed)",
            *kube.notes(deployment, placement, name),
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
    """KServe's LLMInferenceService (serving.kserve.io/v1alpha1, which 0.20 serves beside v1alpha2). What is
    not said here comes from KServe's own template of a vLLM container (``config-llm-template.yaml``), with
    which it is merged; the arguments of vLLM go through the variable that the template reads.

    Raises:
        UsageError: no claim: KServe takes a model by a URI.
    """
    if placement.claim is None:
        raise UsageError(
            "--output kserve needs --claim NAME: KServe mounts a model from a PersistentVolumeClaim (pvc://)"
        )
    name = kube_name(deployment)
    uri = f"pvc://{placement.claim}/{placement.path}".rstrip("/")
    # KServe's template sets these itself
    kept = _flags_without(deployment, "--served-model-name", "--tensor-parallel-size", "--host", "--port")
    # a shell reads it, after the kubelet
    arguments = {"name": "VLLM_ADDITIONAL_ARGS", "value": shlex.join(kept).replace("$(", "$$(")}
    # its template has a home of its own, that every user can write to
    environment = [e for e in kube.environment(deployment, name) if e["name"] != "HOME"]
    container: dict[str, Any] = {
        "name": "main",
        "image": image(deployment),
        "env": [*environment, arguments],
        "resources": kube.resources(deployment, placement),
        "startupProbe": {"failureThreshold": -(-start_seconds(deployment) // 10)},
    }
    if user := kube.non_root(deployment):  # the template wants another than root, and the image's is root
        container["securityContext"] = user
    template: dict[str, Any] = {
        "containers": [container],
        "terminationGracePeriodSeconds": GRACE,
        "volumes": [{"name": "dshm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}],
        **kube.tolerations(deployment),
        **kube.node_rules(deployment),
    }
    spec: dict[str, Any] = {
        "model": {"uri": uri, "name": deployment.name},
        "replicas": 1,
        "parallelism": {"tensor": deployment.tensor_parallel},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": template,
    }
    return head(
        replace(deployment, warnings=()),
        "Apply it with: kubectl apply -f FILE (KServe 0.16 or newer with its LLMInferenceService)",
        *kube.notes(deployment, placement, name),
        contained=True,
    ) + to_yaml(
        {
            "apiVersion": "serving.kserve.io/v1alpha1",
            "kind": "LLMInferenceService",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


def production_stack(deployment: Deployment, placement: Placement) -> str:
    """Values of vLLM's production-stack chart (``helm install NAME vllm/vllm-stack -f FILE``).

    Without its word for it the chart turns prefix caching off; and it mounts shared memory where the ranks
    are told as its own value alone.
    """
    name = kube_name(deployment)
    resources = kube.resources(deployment, placement)
    repository, _, tag = image(deployment).rpartition(":")
    flags = _flags_without(deployment, "--host", "--port", "--tensor-parallel-size")
    drain = ["--shutdown-timeout", str(_CHART_GRACE - 10)] if drain_words(deployment) else []
    config: dict[str, Any] = {"enablePrefixCaching": True, "extraArgs": [*flags, *drain]}
    if deployment.tensor_parallel > 1:
        config["tensorParallelSize"] = deployment.tensor_parallel
    gpus = next(iter(resources.get("limits", {}).values()), 0)
    volumes = [kube.volume(deployment, placement)]
    mounts = [m for m in kube.mounts(deployment, placement) if m["name"] != "shm"]
    if kube.image_user(deployment):
        volumes.append({"name": "cache", "emptyDir": {}})
    environment = [e for e in kube.environment(deployment, name) if e["name"] != "VLLM_API_KEY"]
    model: dict[str, Any] = {
        "name": name,
        "repository": repository,
        "tag": tag,
        "modelURL": MOUNTED,
        "replicaCount": 1,
        "requestCPU": int(resources["requests"]["cpu"]),
        "requestMemory": resources["requests"]["memory"],
        "requestGPU": gpus,
        "vllmConfig": config,
        "shmSize": SHARED_MEMORY,
        "extraVolumes": volumes,
        "extraVolumeMounts": mounts,
        "env": environment,
        **kube.tolerations(deployment),
    }
    if rules := kube.node_rules(deployment):
        labels = [{"key": k, "operator": "In", "values": [v]} for k, v in rules["nodeSelector"].items()]
        required = rules["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        (term,) = required["nodeSelectorTerms"]
        model["nodeSelectorTerms"] = [{"matchExpressions": [*labels, *term["matchExpressions"]]}]
    resource = PLATFORMS[deployment.platform].resource
    if resource not in (None, "nvidia.com/gpu"):
        model["requestGPUType"] = resource
    spec: dict[str, Any] = {
        "runtimeClassName": "",
        "strategy": {"type": "Recreate"},  # a rolling update would need a second set of GPUs
        "startupProbe": {"failureThreshold": -(-start_seconds(deployment) // 10)},
        "containerSecurityContext": kube.security(deployment),
        "modelSpec": [model],
    }
    if deployment.api_key_env:
        spec["vllmApiKey"] = {"secretName": f"{name}-key", "secretKey": "api-key"}
    return head(
        replace(deployment, warnings=()),
        "helm repo add vllm https://vllm-project.github.io/production-stack; "
        "helm install NAME vllm/vllm-stack -f FILE",
        *kube.notes(deployment, placement, name),
    ) + to_yaml({"servingEngineSpec": spec})
