"""A deployment on Ray: an application of Ray Serve LLM, and the same with its cluster for KubeRay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quant.engines.base import ImageUser
from quant.errors import UsageError
from quant.serving.artefacts import kubernetes as kube
from quant.serving.artefacts.base import (
    MOUNTED,
    Placement,
    head,
    kube_name,
    to_yaml,
)
from quant.serving.deployment import Deployment

#: Ray with vLLM (docker.io): the image, Ray's release in it, that of vLLM, and the user that it is made for
#: (Ray's docker/base-deps).
_IMAGE, _RAY, _VLLM = "rayproject/ray-llm:2.58.0-py312-cu130", "2.58.0", "0.26"
_USER = ImageUser(uid=1000, gid=100, home="/home/ray")
#: Of the head, which places and watches and holds no model.
_HEAD = {"cpu": "2", "memory": "8Gi"}


def ray_serve(deployment: Deployment, placement: Placement) -> str:
    """A Ray Serve LLM application (``serve run FILE``); the engine's arguments are ``engine_kwargs``.

    Raises:
        UsageError: an API key, which its OpenAI application checks none of.
    """
    application = _application(deployment, str(deployment.model_path))
    said = (
        "Run it with: serve run FILE (pip install 'ray[serve,llm]'); every node needs the path of the model."
    )
    http = {"host": deployment.host, "port": deployment.port}
    return head(deployment, said) + to_yaml({"http_options": http, "applications": [application]})


def ray_service(deployment: Deployment, placement: Placement) -> str:
    """A RayService (ray.io/v1, KubeRay 1.4 on): the same application and the cluster that runs it, a pod for
    the head and one of a worker for each of ``nodes``. KubeRay makes the Service.

    Raises:
        UsageError: an API key; hardware that Ray publishes no image with vLLM for; GPUs that the nodes cannot
            share evenly.
    """
    if deployment.platform != "cuda":
        raise UsageError(
            f"--output ray-service is for NVIDIA's GPUs, not {deployment.platform}: Ray publishes its image "
            "with vLLM for those alone: --output kubernetes runs vLLM's own"
        )
    nodes, ranks = placement.nodes, deployment.ranks
    if ranks % nodes:
        raise UsageError(
            f"--nodes is {nodes} for {ranks} GPU{'s' * (ranks > 1)}: as many as divide the GPUs are needed "
            "(--tensor-parallel, or -- --pipeline-parallel-size N)"
        )
    name = kube_name(deployment)
    application = _application(deployment, MOUNTED)
    main = _container(deployment, placement, "ray-head", {"requests": _HEAD, "limits": _HEAD})
    main["ports"] = [
        {"name": n, "containerPort": p}
        for n, p in {"gcs": 6379, "dashboard": 8265, "client": 10001, "serve": 8000}.items()
    ]
    worker = _container(deployment, placement, "ray-worker", kube.resources(deployment, placement))
    cluster = {
        "rayVersion": _RAY,
        "headGroupSpec": {
            # without cores of its own nothing of the application is placed beside it
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": {"spec": _pod(deployment, placement, main)},
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu",
                "replicas": nodes,
                "minReplicas": nodes,
                "maxReplicas": nodes,
                "rayStartParams": {},
                "template": {
                    "spec": _pod(deployment, placement, worker)
                    | kube.tolerations(deployment)
                    | kube.node_rules(deployment)
                },
            }
        ],
    }
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "labels": kube.labels(name)},
        "spec": {
            "serveConfigV2": to_yaml({"applications": [application]}),
            "rayClusterConfig": cluster,
        },
    }
    return head(
        replace(deployment, warnings=()),
        "Apply it with: kubectl apply -f FILE (the KubeRay operator must be installed)",
        f"{_IMAGE} has vLLM {_VLLM}: take another tag where the checkpoint needs a newer one.",
        *kube.notes(deployment, placement, name, _USER),
        f"KubeRay makes it, and names it {name}-serve-svc.",
        addressed=False,
    ) + to_yaml(service)


def _application(deployment: Deployment, source: str) -> dict[str, Any]:
    """An application of Ray Serve's schema.

    Args:
        source: where the processes that run the model see it.
    """
    import yaml

    if deployment.api_key_env:
        raise UsageError(
            f"--api-key-env is {deployment.api_key_env}: Ray Serve's application checks no key: leave it "
            "out, and put a gateway in front that does"
        )
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
        "model_loading_config": {"model_id": deployment.name, "model_source": source},
        "engine_kwargs": arguments,
        "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 1}},
        "runtime_env": {"env_vars": deployment.environment},
    }
    return {
        "name": kube_name(deployment),
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [config]},
    }


def _container(
    deployment: Deployment, placement: Placement, name: str, resources: dict[str, Any]
) -> dict[str, Any]:
    """A container of Ray; KubeRay writes its command and its probes."""
    return {
        "name": name,
        "image": _IMAGE,
        "resources": resources,
        "securityContext": kube.security(deployment, _USER),
        "volumeMounts": kube.mounts(deployment, placement, _USER),
    }


def _pod(deployment: Deployment, placement: Placement, container: dict[str, Any]) -> dict[str, Any]:
    """A pod wherever there is room for it."""
    value = kube.pod(deployment, placement, [container])
    for key in ("tolerations", "nodeSelector", "affinity"):
        value.pop(key, None)
    return value
