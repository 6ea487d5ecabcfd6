"""A deployment as a file that runs it elsewhere: shell, Docker Compose, Kubernetes, systemd. No torch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quant import defaults
from quant.errors import one_of
from quant.serving.deployment import OFFLINE, Deployment
from quant.vllm.arguments import Argument
from quant.vllm.releases import VLLM_VERSION

IMAGE = f"vllm/vllm-openai:v{VLLM_VERSION}.0"
#: Where a container sees the checkpoint.
MOUNTED = "/models/checkpoint"


def _head(deployment: Deployment, launch: str, *more: str, contained: bool = False) -> str:
    lines = [f"vLLM serving {deployment.name}. {launch}", "", "Why each flag has its value:"]
    everywhere = [
        Argument("host", "0.0.0.0", "every address of the container"),
        Argument("port", defaults.PORT, "of the container"),
    ]
    reasons = [*deployment.arguments, *everywhere] if contained else deployment.reasons()
    lines += [f"  {' '.join(a.words)}: {a.reason}" for a in reasons]
    lines += [f"  {' '.join(deployment.extra)}: as asked"] if deployment.extra else []
    lines += ["", *more] if more else []
    lines += [line for w in deployment.warnings for line in ("", f"WARNING: {w}")]
    # a name with a line break must not end the comment
    return "".join(f"# {_one_line(line)}".rstrip() + "\n" for line in lines)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _kube_name(name: str) -> str:
    """A DNS label: small letters, digits and dashes, starting with a letter, at most 50 characters."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-")
    return f"vllm-{label}"[:58].strip("-") if label else "vllm"


def _yaml(value: Any) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # equal labels are written out: anchors are for machines

    return str(yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=160))


def shell(deployment: Deployment) -> str:
    """A POSIX shell script."""
    lines = [f"export {k}={v}" for k, v in OFFLINE.items()]
    if deployment.api_key_env:
        key = deployment.api_key_env
        lines.append(f'export VLLM_API_KEY="${{{key}:?set {key} to the API key first}}"')
    flags, words = [], deployment.flags()
    while words:
        taken = 2 if words[0].startswith("-") and len(words) > 1 and not words[1].startswith("-") else 1
        flags.append(shlex.join(words[:taken]))
        words = words[taken:]
    command = " \\\n  ".join([f"exec vllm serve {shlex.quote(str(deployment.model_path))}", *flags])
    return (
        "#!/bin/sh\n"
        + _head(deployment, "Run it in an environment with vLLM.")
        + "set -eu\n"
        + "\n".join(lines)
        + "\n"
        + command
        + "\n"
    )


def compose(deployment: Deployment) -> str:
    """A Docker Compose file. The container listens on all of its own addresses; the published one is the
    wished host."""
    host = f"[{deployment.host}]" if ":" in deployment.host else deployment.host
    environment = dict(OFFLINE)
    if deployment.api_key_env:
        environment["VLLM_API_KEY"] = f"${{{deployment.api_key_env}:?set it to the API key first}}"
    service = {
        "image": IMAGE,
        "command": [
            w.replace("$", "$$")
            for w in ["--model", MOUNTED, *deployment.flags(host="0.0.0.0", port=defaults.PORT)]
        ],
        "environment": environment,
        "volumes": [
            {
                "type": "bind",
                "source": str(deployment.model_path).replace("$", "$$"),
                "target": MOUNTED,
                "read_only": True,
            }
        ],
        "ports": [f"{host}:{deployment.port}:{defaults.PORT}"],
        "ipc": "host",
        "restart": "unless-stopped",
        "healthcheck": {
            "test": [
                "CMD",
                "python3",
                "-c",
                f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{defaults.PORT}/health', "
                "timeout=5)",
            ],
            "interval": "10s",
            "timeout": "6s",
            "retries": 3,
            "start_period": "15m",
        },
        "deploy": {
            "resources": {
                "reservations": {
                    "devices": [
                        {"driver": "nvidia", "count": deployment.tensor_parallel, "capabilities": ["gpu"]}
                    ]
                }
            }
        },
    }
    head = _head(
        deployment,
        "Start it with: docker compose -f FILE up -d",
        f"Compose publishes the container's port on {deployment.host} port {deployment.port} only.",
        contained=True,
    )
    return head + _yaml({"services": {_kube_name(deployment.name): service}})


def kubernetes(deployment: Deployment) -> str:
    """A Deployment and a Service. The checkpoint is taken from the same path of the node."""
    name = _kube_name(deployment.name)
    more = [
        "Each node that may run it needs the checkpoint at the path of the volume; replace hostPath by a "
        "claim where storage is shared.",
        "The Service is reachable inside the cluster only.",
    ]
    if deployment.api_key_env:
        more.append(
            f"The API key: kubectl create secret generic {name}-key "
            f'--from-literal=api-key="${deployment.api_key_env}"'
        )
    # neither the wished host nor its warning has a meaning inside a cluster
    inside = replace(deployment, warnings=())
    return (
        _head(inside, "Apply it with: kubectl apply -f FILE", *more, contained=True)
        + _yaml(_workload(deployment, name))
        + "---\n"
        + _yaml(_service(deployment, name))
    )


def _workload(deployment: Deployment, name: str) -> dict[str, Any]:
    """The Deployment object: one pod of :func:`_container`."""
    labels = _labels(name)
    pod = {
        "containers": [_container(deployment, name)],
        "enableServiceLinks": False,  # a service named vllm would set VLLM_PORT, which vLLM reads
        "terminationGracePeriodSeconds": 60,
        "volumes": [
            {"name": "model", "hostPath": {"path": str(deployment.model_path), "type": "Directory"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}},
        ],
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a rolling update would need a second set of GPUs
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _container(deployment: Deployment, name: str) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in OFFLINE.items()]
    if deployment.api_key_env:
        secret = {"name": f"{name}-key", "key": "api-key"}
        environment.append({"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": secret}})

    def probe(**seconds: int) -> dict[str, Any]:
        return {"httpGet": {"path": "/health", "port": "http"}, **seconds}

    words = ["--model", MOUNTED, *deployment.flags(host="0.0.0.0", port=defaults.PORT)]
    return {
        "name": "vllm",
        "image": IMAGE,
        "args": [w.replace("$(", "$$(") for w in words],  # the kubelet would expand $(NAME) in arguments
        "env": environment,
        "ports": [{"name": "http", "containerPort": defaults.PORT}],
        "startupProbe": probe(periodSeconds=10, failureThreshold=180),
        "readinessProbe": probe(periodSeconds=5, failureThreshold=2),
        "livenessProbe": probe(periodSeconds=10, failureThreshold=6),
        "resources": {"limits": {"nvidia.com/gpu": deployment.tensor_parallel}},
        "volumeMounts": [
            {"name": "model", "mountPath": MOUNTED, "readOnly": True},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


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


def systemd(deployment: Deployment) -> str:
    """A service unit."""

    def quoted(word: str) -> str:
        for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"), ("\n", "\\n")):
            word = word.replace(char, escaped)
        return f'"{word}"' if not re.fullmatch(r"[\w@%+=:,./$-]+", word) else word

    name = _kube_name(deployment.name)
    key = [f"EnvironmentFile=/etc/vllm/{name}.env"] if deployment.api_key_env else []
    more = (
        [f"Put VLLM_API_KEY=<the key> into /etc/vllm/{name}.env (mode 0600, owner root)."]
        if deployment.api_key_env
        else []
    )
    command = ["/usr/bin/env", "vllm", "serve", str(deployment.model_path), *deployment.flags()]
    lines = [
        "[Unit]",
        f"Description=vLLM serving {_one_line(deployment.name).replace('%', '%%')}",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        "# the environment that vLLM is installed in: put its bin folder first",
        "Environment=PATH=/srv/vllm/bin:/usr/local/bin:/usr/bin:/bin",
        *(f"Environment={k}={v}" for k, v in OFFLINE.items()),
        *key,
        "ExecStart=" + " ".join(quoted(w) for w in command),
        "Restart=on-failure",
        "RestartSec=10",
        "TimeoutStopSec=60",
        "KillMode=mixed",
        "DynamicUser=yes",
        "StateDirectory=" + name,
        "Environment=HOME=/var/lib/" + name,
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "PrivateTmp=yes",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    head = _head(
        deployment,
        f"Save it as /etc/systemd/system/{name}.service, then: systemctl enable --now {name}",
        *more,
    )
    return head + "\n".join(lines) + "\n"


ARTEFACTS: Mapping[str, Callable[[Deployment], str]] = {
    "shell": shell,
    "compose": compose,
    "kubernetes": kubernetes,
    "systemd": systemd,
}


def artefact(deployment: Deployment, kind: str) -> str:
    """The text of one artefact; ``kind`` is a key of :data:`ARTEFACTS`.

    Raises:
        UsageError: an unknown kind.
    """
    if kind not in ARTEFACTS:
        raise one_of("--output", kind, list(ARTEFACTS))
    return ARTEFACTS[kind](deployment)
