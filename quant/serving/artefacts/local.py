"""A deployment on one machine: shell, Docker Compose, systemd."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from typing import Any

from quant import defaults
from quant.serving.artefacts.base import (
    GRACE,
    PLATFORMS,
    Placement,
    container_words,
    drain_words,
    head,
    image,
    key_variable,
    kube_name,
    mounted,
    one_line,
    source,
    start_seconds,
    to_yaml,
    variables,
)
from quant.serving.artefacts.ollama import ollama_script
from quant.serving.deployment import Deployment


def shell(deployment: Deployment, placement: Placement) -> str:
    """A POSIX shell script."""
    if deployment.engine.by_variables:
        return ollama_script(deployment)
    lines = [f"export {k}={v}" for k, v in deployment.environment.items()]
    key = deployment.api_key_env
    if key:
        lines.append(f'export {key_variable(deployment)}="${{{key}:?set {key} to the API key first}}"')
    flags, words = [], deployment.flags()
    while words:
        taken = 2 if words[0].startswith("-") and len(words) > 1 and not words[1].startswith("-") else 1
        flags.append(shlex.join(words[:taken]))
        words = words[taken:]
    if given := deployment.key_words(f'"${key_variable(deployment)}"'):
        flags.append(" ".join(given))
    program = shlex.join([*deployment.engine.program, str(deployment.model_path)])
    command = " \\\n  ".join([f"exec {program}", *flags])
    return (
        "#!/bin/sh\n"
        + head(deployment, f"Run it in an environment with {deployment.engine.title}.")
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
    environment = variables(deployment)
    key = f"${{{deployment.api_key_env}:?set it to the API key first}}"
    if deployment.api_key_env and deployment.engine.key_variable:
        environment[deployment.engine.key_variable] = key
    command = [w.replace("$", "$$") for w in container_words(deployment)]
    service: dict[str, Any] = {
        "image": image(deployment),
        "command": [*command, *deployment.key_words(key)],
        "environment": environment,
        "volumes": [
            {
                "type": "bind",
                "source": str(source(deployment)).replace("$", "$$"),
                "target": mounted(deployment).replace("$", "$$"),
                "read_only": True,
            }
        ],
        "ports": [f"{host}:{deployment.port}:{defaults.PORT}"],
        "ipc": "host",
        "restart": "unless-stopped",
        "stop_grace_period": f"{GRACE}s",
        "healthcheck": {
            "test": _probe(deployment),
            "interval": "10s",
            "timeout": "6s",
            "retries": 3,
            "start_period": f"{start_seconds(deployment)}s",
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
    return above + to_yaml({"services": {kube_name(deployment): service}})


def _probe(deployment: Deployment) -> list[str]:
    """A command inside the container that fails while the server is not healthy, of what its image has."""
    url = f"http://127.0.0.1:{defaults.PORT}{deployment.engine.health}"
    return ["CMD", *(word.format(url=url) for word in deployment.engine.probe)]


def systemd(deployment: Deployment, placement: Placement) -> str:
    """A service unit."""

    def quoted(word: str) -> str:
        for char, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$"), ("\n", "\\n")):
            word = word.replace(char, escaped)
        return f'"{word}"' if not re.fullmatch(r"[\w@%+=:,./$-]+", word) else word

    name, engine = kube_name(deployment), deployment.engine
    folder = kube_name(replace(deployment, name=""))
    keys = f"/etc/{folder}/{name}.env"
    key = [f"EnvironmentFile={keys}"] if deployment.api_key_env else []
    more = (
        [f"Put {key_variable(deployment)}=<the key> into {keys} (mode 0600, owner root)."]
        if deployment.api_key_env
        else []
    )
    command = [*engine.program, str(deployment.model_path), *deployment.flags(), *drain_words(deployment)]
    words = [
        "/usr/bin/env",
        *map(quoted, command),
        *deployment.key_words(f"${{{key_variable(deployment)}}}"),
    ]
    lines = [
        "[Unit]",
        f"Description={engine.title} serving {one_line(deployment.name).replace('%', '%%')}",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        "Type=exec",
        f"# the environment that {engine.title} is installed in: put its bin folder first",
        f"Environment=PATH=/srv/{folder}/bin:/usr/local/bin:/usr/bin:/bin",
        *(f"Environment={k}={v}" for k, v in deployment.environment.items()),
        *key,
        "ExecStart=" + " ".join(words),
        "Restart=on-failure",
        "RestartSec=10",
        f"TimeoutStopSec={GRACE}",
        "KillMode=mixed",
        "DynamicUser=yes",
        *(
            ["SupplementaryGroups=video render"] if deployment.platform == "rocm" else []
        ),  # /dev/kfd, /dev/dri
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
