"""What all artefacts share: the head that explains them, names, YAML, and what a container needs on each
platform."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quant import defaults
from quant.serving.deployment import Deployment
from quant.vllm.arguments import Argument
from quant.vllm.releases import VLLM_VERSION

#: Where a container sees the checkpoint.
MOUNTED = "/models/checkpoint"


@dataclass(frozen=True)
class Platform:
    """What a container of vLLM needs on a kind of hardware.

    Attributes:
        repository: of the image that vLLM's project publishes.
        resource: how Kubernetes counts its devices; None where a device is not counted.
        service: keys of a Compose service beside the common ones.
        environment: variables of the container.
    """

    repository: str
    resource: str | None = None
    service: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def image(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def tag(self) -> str:
        return f"v{VLLM_VERSION}.0"


#: By :attr:`quant.hardware.Gpu.platform`; vLLM's documentation of its images (deployment/docker, 2026).
PLATFORMS = {
    "cuda": Platform("vllm/vllm-openai", "nvidia.com/gpu"),
    "rocm": Platform(
        "vllm/vllm-openai-rocm",
        "amd.com/gpu",
        {
            "devices": ["/dev/kfd", "/dev/dri"],
            "group_add": ["video"],
            "cap_add": ["SYS_PTRACE"],
            "security_opt": ["seccomp=unconfined"],
        },
    ),
    # the cache takes whole GiB of the machine's memory; SYS_NICE lets vLLM bind its threads and pages
    "cpu": Platform(
        "vllm/vllm-openai-cpu",
        service={"cap_add": ["SYS_NICE"]},
        environment={"VLLM_CPU_KVCACHE_SPACE": "4"},
    ),
}


@dataclass(frozen=True)
class Placement:
    """What an artefact is told beside the deployment.

    Attributes:
        claim: PersistentVolumeClaim that holds the checkpoint; None: the path of the node.
        path: where in the claim it lies.
        nodes: machines that share the model.
        price: of an hour of all its hardware, in whatever currency.
    """

    claim: str | None = None
    path: str = ""
    nodes: int = 1
    price: float | None = None


def container_words(deployment: Deployment) -> list[str]:
    """What the images' entry point, ``vllm serve``, is given."""
    return [MOUNTED, *deployment.flags(host="0.0.0.0", port=defaults.PORT)]


def head(deployment: Deployment, launch: str, *more: str, contained: bool = False) -> str:
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
    return "".join(f"# {one_line(line)}".rstrip() + "\n" for line in lines)


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def kube_name(name: str) -> str:
    """A DNS label: small letters, digits and dashes, starting with a letter, at most 50 characters."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-")
    return f"vllm-{label}"[:58].strip("-") if label else "vllm"


def to_yaml(value: Any) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True  # equal labels are written out: anchors are for machines

    return str(yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=160))
