"""A deployment on one machine: shell, Docker Compose, systemd."""

from __future__ import annotations

import re
import shlex
from typing import Any

from quant import defaults
from quant.serving.artefacts.base import (
    MOUNTED,
    PLATFORMS,
    Placement,
    container_words,
    head,
    kube_name,
    one_line,
    to_yaml,
)
from quant.serving.deployment import OFFLINE, Deployment


def shell(deployment: Deployment, placement: Placement) -> str:
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
        + head(deployment, "Run it in an environment with vLLM.")
        + "set -eu\n"
        + "\n".join(lines)
        + "\n"
        + command
        + "\n"
    )


def compose(deployment: Deployment, placement: Placement) -> str:
    """A Docker Compose file. The container listens on all of its own addresses; the published one is the
    wished host."""
    host = f"[{deployment.host}]" if ":" in deployment.host else deployment.host
    platform = PLATFORMS[deployment.platform]
    environment = {**OFFLINE, **platform.environment}
    if deployment.api_key_env:
        environment["VLLM_API_KEY"] = f"${{{deployment.api_key_env}:?set it to the API key first}}"
    service: dict[str, Any] = {
        "image": platform.image,
        "command": [w.replace("$", "$$") for w in container_words(deployment)],
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
        **platform.service,
    }
    if deployment.platform == "cuda":
        device = {"driver": "nvidia", "count": deployment.tensor_parallel, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    above = head(
        deployment,
        "Start it with: docker compose -f FILE up -d",
        f"Compose publishes the container's port on {deployment.host} port {deployment.port} only.",
        contained=True,
    )
    return above + to_yaml({"services": {kube_name(deployment.name): service}})


def systemd(deployment: Deployment, placement: Placement) -> str:
    """A service unit."""

    def quoted(word: str) -> str:
        for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"), ("\n", "\\n")):
            word = word.replace(char, escaped)
        return f'"{word}"' if not re.fullmatch(r"[\w@%+=:,./$-]+", word) else word

    name = kube_name(deployment.name)
    key = [f"EnvironmentFile=/etc/vllm/{name}.env"] if deployment.api_key_env else []
    more = (
        [f"Put VLLM_API_KEY=<the key> into /etc/vllm/{name}.env (mode 0600, owner root)."]
        if deployment.api_key_env
        else []
    )
    command = ["/usr/bin/env", "vllm", "serve", str(deployment.model_path), *deployment.flags()]
    lines = [
        "[Unit]",
        f"Description=vLLM serving {one_line(deployment.name).replace('%', '%%')}",
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
    above = head(
        deployment,
        f"Save it as /etc/systemd/system/{name}.service, then: systemctl enable --now {name}",
        *more,
    )
    return above + "\n".join(lines) + "\n"
