"""What all artefacts share: the head that explains them, names, YAML, and what a container needs on each
platform."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant import defaults
from quant.errors import UsageError
from quant.serving.passed_on import named
from quant.vllm.arguments import Argument

if TYPE_CHECKING:
    from pathlib import Path

    from quant.serving.deployment import Deployment

#: Where a container sees the checkpoint.
MOUNTED = "/models/checkpoint"


@dataclass(frozen=True)
class Platform:
    """What a container needs on a kind of hardware.

    Attributes:
        resource: how Kubernetes counts its devices; None where a device is not counted.
        service: keys of a Compose service beside the common ones.
    """

    resource: str | None = None
    service: Mapping[str, Any] = field(default_factory=dict)


#: By :attr:`quant.hardware.Gpu.platform`; vLLM's documentation of its images (deployment/docker, 2026).
PLATFORMS = {
    "cuda": Platform("nvidia.com/gpu"),
    "rocm": Platform(
        "amd.com/gpu",
        {
            "devices": ["/dev/kfd", "/dev/dri"],
            "group_add": ["video"],
            "cap_add": ["SYS_PTRACE"],
            "security_opt": ["seccomp=unconfined"],
        },
    ),
    "cpu": Platform(service={"cap_add": ["SYS_NICE"]}),  # lets vLLM bind its threads and pages
}

#: GiB of a machine's memory that the KV cache takes on a CPU.
CPU_CACHE = 4
#: Memory that ranks exchange through; the default of a pod is 64 MiB.
SHARED_MEMORY = "8Gi"
#: Seconds that requests under way get to end in once the server is told to stop.
DRAIN = 30
#: Seconds between the word to stop and the end: a balancer's to notice, :data:`DRAIN`, and the engine's own.
GRACE = 75
#: Seconds of a start beside reading the weights (processes, compilation, graphs), and bytes a second at which
#: a volume in the network reads them.
_START, _READ = 600, 200 * 10**6


def start_seconds(deployment: Deployment) -> int:
    """Seconds after which a start counts as failed."""
    return _START + int(deployment.checkpoint_bytes / _READ)


@dataclass(frozen=True)
class Placement:
    """What an artefact is told beside the deployment.

    Attributes:
        claim: PersistentVolumeClaim that holds the checkpoint; None: the path of the node.
        path: where in the claim it lies.
        nodes: machines that share the model.
        price: of an hour of all its hardware, in whatever currency.
        profile: of the limits that alerts watch; see :func:`quant.serving.check.profile.read_profile`.
    """

    claim: str | None = None
    path: str = ""
    nodes: int = 1
    price: float | None = None
    profile: str = "chat"


def variables(deployment: Deployment) -> dict[str, str]:
    """Variables of the container, but for the key's."""
    cache = deployment.engine.cache_variable if deployment.platform == "cpu" else ""
    return deployment.environment | ({cache: str(CPU_CACHE)} if cache else {})


def image(deployment: Deployment) -> str:
    """
    Raises:
        UsageError: the engine's project publishes no image for that hardware.
    """
    engine, gpu = deployment.engine, deployment.gpu
    found = engine.image(gpu)
    if found is None:
        raise UsageError(
            f"{engine.title} publishes no image for {gpu.name if gpu else deployment.platform} that is known "
            "here: --output shell or systemd runs what is installed"
        )
    return found


def mounted(deployment: Deployment) -> str:
    """Where a container sees the model: a folder; its name is the model's where the engine has no other way
    to be told it."""
    engine = deployment.engine
    return MOUNTED if engine.model_name or not engine.flags else f"/models/{deployment.name}"


def source(deployment: Deployment) -> Path:
    """The folder that a container sees: of a single file the one it lies in."""
    path = deployment.model_path
    return path.parent if deployment.engine.files else path


def drain_words(deployment: Deployment) -> list[str]:
    """The flag that lets requests under way end, unless it was passed on."""
    flag = deployment.engine.drain
    if not flag or flag in named(deployment.extra):
        return []
    return [f"--{flag}", str(DRAIN)]


def container_words(deployment: Deployment) -> list[str]:
    """What a container is given behind its entry point, but for the API key."""
    model = mounted(deployment)
    if deployment.engine.files:
        model = f"{model}/{deployment.model_path.name}"
    flags = deployment.flags(host="0.0.0.0", port=defaults.PORT)
    return [*deployment.engine.entry, model, *flags, *drain_words(deployment)]


def key_variable(deployment: Deployment) -> str:
    """The variable that holds the API key where the engine runs."""
    return deployment.engine.key_variable or "API_KEY"


def head(
    deployment: Deployment, launch: str, *more: str, contained: bool = False, addressed: bool = True
) -> str:
    """The comment above a file.

    Args:
        contained: whether it listens to every address of a container.
        addressed: whether the address is an argument of the engine at all.
    """
    title = deployment.engine.title
    lines = [f"{title} serving {deployment.name}. {launch}", "", "Why each flag has its value:"]
    everywhere = [
        Argument(deployment.word("host"), "0.0.0.0", "every address of the container"),
        Argument(deployment.word("port"), defaults.PORT, "of the container"),
    ]
    reasons = [*deployment.arguments, *everywhere] if contained else deployment.reasons()
    lines += [
        f"  {deployment.shown(a)}: {a.reason}" for a in (reasons if addressed else deployment.arguments)
    ]
    if contained and (drain := drain_words(deployment)):
        lines.append(f"  {' '.join(drain)}: requests under way end before it stops")
    lines += [f"  {' '.join(deployment.extra)}: as asked"] if deployment.extra else []
    lines += ["", *more] if more else []
    lines += ["", *deployment.notes] if deployment.notes else []
    lines += [line for w in deployment.warnings for line in ("", f"WARNING: {w}")]
    # a name with a line break must not end the comment
    return "".join(f"# {one_line(line)}".rstrip() + "\n" for line in lines)


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def kube_name(deployment: Deployment) -> str:
    """A DNS label: small letters, digits and dashes, starting with a letter, at most 58 characters."""
    engine, label = (
        re.sub(r"[^a-z0-9]+", "-", x.lower()).strip("-") for x in (deployment.engine.name, deployment.name)
    )
    return f"{engine}-{label[:50]}"[:58].strip("-") if label else engine


def to_yaml(value: Any) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # equal labels are written out: anchors are for machines

    return str(yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=160))
