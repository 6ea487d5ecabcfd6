"""A deployment in a cluster, as plain Kubernetes objects; the parts of a pod that other stacks share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quant import defaults
from quant.engines.base import ImageUser
from quant.serving.artefacts.base import (
    CPU_CACHE,
    GRACE,
    PLATFORMS,
    SHARED_MEMORY,
    Placement,
    container_words,
    head,
    image,
    key_variable,
    kube_name,
    mounted,
    source,
    start_seconds,
    to_yaml,
    variables,
)
from quant.serving.deployment import Deployment
from quant.units import GIB, MIB

#: GiB of memory that a container asks for beside the bytes of the checkpoint, which are read through its page
#: cache: of the server, and of each GPU's worker; and cores for each GPU: the API server, the engine, a
#: worker. There is no limit of memory, because the page cache would count.
_SERVER, _WORKER, _CORES = 4, 4, 4
#: Seconds before a pod that is told to stop passes it on: balancers still send it requests.
_DEREGISTERED = 5
#: Share of a GPU's memory that a node's must exceed to count as the same: labels have the driver's number.
_SAME_MEMORY = 0.95


def kubernetes(deployment: Deployment, placement: Placement) -> str:
    """A Deployment and a Service."""
    name = kube_name(deployment)
    # neither the wished host nor its warning has a meaning inside a cluster
    inside = replace(deployment, warnings=())
    return (
        head(
            inside,
            "Apply it with: kubectl apply -f FILE",
            *notes(deployment, placement, name),
            contained=True,
        )
        + to_yaml(_workload(deployment, placement, name))
        + "---\n"
        + to_yaml(service(deployment, name))
    )


def notes(
    deployment: Deployment, placement: Placement, name: str, user: ImageUser | None = None
) -> list[str]:
    """What whoever applies a file must know; ``user`` as of :func:`security`."""
    where = (
        f"The claim {placement.claim} holds the checkpoint: kubectl cp it there first, or fill it by a job."
        if placement.claim
        else "Each node that may run it needs the checkpoint at the path of the volume; --claim NAME takes "
        "it from a PersistentVolumeClaim instead."
    )
    more = [where]
    if user := user or image_user(deployment):
        more.append(
            f"It runs as user {user.uid} of group {user.gid}, who must be able to read the checkpoint."
        )
    if node_rules(deployment):
        more.append(
            "It goes to nodes whose labels, written by NVIDIA's GPU feature discovery, say this GPU: without "
            "those, take nodeSelector and affinity out."
        )
    more.append("The Service is reachable inside the cluster only.")
    if deployment.api_key_env:
        more.append(
            f"The API key: kubectl create secret generic {name}-key "
            f'--from-literal=api-key="${deployment.api_key_env}"'
        )
    return more


def _workload(deployment: Deployment, placement: Placement, name: str) -> dict[str, Any]:
    """The Deployment object: one pod of :func:`container`."""
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels(name)},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a rolling update would need a second set of GPUs
            "progressDeadlineSeconds": start_seconds(deployment) + 60,
            "selector": {"matchLabels": labels(name)},
            "template": {
                "metadata": {"labels": labels(name)},
                "spec": pod(deployment, placement, [container(deployment, placement, name)]),
            },
        },
    }


def pod(deployment: Deployment, placement: Placement, containers: list[dict[str, Any]]) -> dict[str, Any]:
    """A pod's spec, with the volumes that :func:`mounts` names."""
    value: dict[str, Any] = {
        "containers": containers,
        "enableServiceLinks": False,  # a service named vllm would set VLLM_PORT, which vLLM reads
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": GRACE,
        "volumes": [volume(deployment, placement), _SHARED_MEMORY],
    }
    if image_user(deployment):
        value["volumes"].append({"name": "cache", "emptyDir": {}})
    return value | tolerations(deployment) | node_rules(deployment)


_SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": SHARED_MEMORY}}


def tolerations(deployment: Deployment) -> dict[str, Any]:
    """Nodes with GPUs are often tainted for those who ask for one."""
    resource = PLATFORMS[deployment.platform].resource
    if resource is None:
        return {}
    return {"tolerations": [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]}


def node_rules(deployment: Deployment) -> dict[str, Any]:
    """Nodes with the GPU that the plan is for, by the labels of NVIDIA's GPU feature discovery (its
    documentation: ``nvidia.com/gpu.compute.major``, ``.minor``, ``nvidia.com/gpu.memory`` in MiB)."""
    gpu = deployment.gpu
    if gpu is None or gpu.platform != "cuda" or gpu.capability is None:
        return {}
    major, minor = gpu.capability
    least = int(gpu.total_bytes * _SAME_MEMORY) // MIB
    memory = {"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [str(least)]}
    return {
        "nodeSelector": {
            "nvidia.com/gpu.compute.major": str(major),
            "nvidia.com/gpu.compute.minor": str(minor),
        },
        "affinity": {
            "nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {
                    "nodeSelectorTerms": [{"matchExpressions": [memory]}]
                }
            }
        },
    }


def image_user(deployment: Deployment) -> ImageUser | None:
    """The user that the image for this hardware is prepared for; None: root."""
    user = deployment.engine.user
    return user if user is not None and deployment.platform in user.platforms else None


def non_root(deployment: Deployment, user: ImageUser | None = None) -> dict[str, Any]:
    """What a security context says of a user, by default :func:`image_user`; empty for root."""
    user = user or image_user(deployment)
    return {"runAsNonRoot": True, "runAsUser": user.uid, "runAsGroup": user.gid} if user else {}


def volume(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    if placement.claim is not None:
        return {
            "name": "model",
            "persistentVolumeClaim": {"claimName": placement.claim, "readOnly": True},
        }
    return {"name": "model", "hostPath": {"path": str(source(deployment)), "type": "Directory"}}


def container(deployment: Deployment, placement: Placement, name: str) -> dict[str, Any]:
    return {
        "name": deployment.engine.container,
        "image": image(deployment),
        "args": [_unexpanded(w) for w in container_words(deployment)] + _key_argument(deployment),
        "env": environment(deployment, name),
        "ports": [{"name": "http", "containerPort": defaults.PORT}],
        **probes(deployment),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_DEREGISTERED)]}}},
        "resources": resources(deployment, placement),
        "securityContext": security(deployment),
        "volumeMounts": mounts(deployment, placement),
    }


def probes(deployment: Deployment) -> dict[str, Any]:
    """The start may take as long as reading the weights and compiling does; then a server that answers
    nothing for a minute is started anew."""

    def probe(**seconds: int) -> dict[str, Any]:
        asked = {"path": deployment.engine.health, "port": "http"}
        return {"httpGet": asked, "timeoutSeconds": 5, **seconds}

    return {
        "startupProbe": probe(periodSeconds=10, failureThreshold=-(-start_seconds(deployment) // 10)),
        "readinessProbe": probe(periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe(periodSeconds=10, failureThreshold=6),
    }


def security(deployment: Deployment, user: ImageUser | None = None) -> dict[str, Any]:
    """Of a container: nothing that a server needs not. ``user``: of another image than the engine's."""
    return {
        **non_root(deployment, user),
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def _unexpanded(word: str) -> str:
    """A word in which the kubelet sees no $(NAME) to replace."""
    return word.replace("$(", "$$(")


def _key_argument(deployment: Deployment) -> list[str]:
    return deployment.key_words(f"$({key_variable(deployment)})")


def environment(deployment: Deployment, name: str) -> list[dict[str, Any]]:
    known = variables(deployment)
    if user := image_user(deployment):
        known["HOME"] = user.home
    values: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in known.items()]
    if deployment.api_key_env:
        secret = {"name": f"{name}-key", "key": "api-key"}
        values.append({"name": key_variable(deployment), "valueFrom": {"secretKeyRef": secret}})
    return values


def resources(deployment: Deployment, placement: Placement) -> dict[str, Any]:
    gpus = max(deployment.ranks // placement.nodes, 1)
    memory = _SERVER + _WORKER * gpus + -(-deployment.checkpoint_bytes // GIB)
    if deployment.platform == "cpu":  # weights and cache are in the machine's memory
        memory += CPU_CACHE
    requests: dict[str, Any] = {"cpu": str(_CORES * gpus), "memory": f"{memory}Gi"}
    resource = PLATFORMS[deployment.platform].resource
    if resource is None:
        return {"requests": requests}
    return {"requests": requests | {resource: gpus}, "limits": {resource: gpus}}


def mounts(
    deployment: Deployment, placement: Placement, user: ImageUser | None = None
) -> list[dict[str, Any]]:
    model: dict[str, Any] = {"name": "model", "mountPath": mounted(deployment), "readOnly": True}
    if placement.claim is not None and placement.path:
        model["subPath"] = placement.path
    values = [model, {"name": "shm", "mountPath": "/dev/shm"}]
    if user := user or image_user(deployment):  # what vLLM compiles survives a container that is started anew
        values.append({"name": "cache", "mountPath": f"{user.home}/.cache"})
    return values


def service(deployment: Deployment, name: str) -> dict[str, Any]:
    """The Service object, of the cluster's inside."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels(name)},
        "spec": {
            "type": "ClusterIP",
            "selector": labels(name),
            "ports": [{"name": "http", "port": deployment.port, "targetPort": "http"}],
        },
    }


def labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": name}
