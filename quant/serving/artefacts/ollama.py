"""Ollama's files: the Modelfile of a GGUF file, and a script that starts Ollama and makes the model known to
it. What is asked stands in environment variables (Ollama's ``docs/faq.mdx``), the context in the Modelfile
(``docs/modelfile.mdx``)."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from quant.serving.artefacts.base import Placement, head

if TYPE_CHECKING:
    from quant.serving.deployment import Deployment

_END = "END_OF_MODELFILE"


def modelfile(deployment: Deployment, placement: Placement) -> str:
    """What ``ollama create NAME -f FILE`` makes a model of."""
    return deployment.modelfile.text


def ollama_script(deployment: Deployment) -> str:
    """A POSIX shell script: Ollama is started, told the model once it answers, and waited for."""
    name = shlex.quote(deployment.name)
    exports = [f"export {k}={shlex.quote(v)}" for k, v in deployment.environment.items()]
    lines = [
        "set -eu",
        *exports,
        "ollama serve &",
        "server=$!",
        "trap 'kill \"$server\" 2>/dev/null || :' EXIT",
        "trap 'exit 143' INT TERM",
        'until ollama list >/dev/null 2>&1; do kill -0 "$server"; sleep 1; done',
        "folder=$(mktemp -d)",
        f"cat >\"$folder/Modelfile\" <<'{_END}'",
        deployment.modelfile.text + _END,
        f'ollama create {name} -f "$folder/Modelfile"',
        'rm -r "$folder"',
        'wait "$server"',
    ]
    launch = f"Clients call the model {deployment.name}. Ollama copies the file into its own folder."
    return "#!/bin/sh\n" + head(deployment, launch) + "\n".join(lines) + "\n"
