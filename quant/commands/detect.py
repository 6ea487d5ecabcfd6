"""``quant detect``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from quant.commands import options
from quant.commands.terminal import Output, common_options

if TYPE_CHECKING:
    from quant.hardware import Gpu


@click.command()
@options.gpu
@common_options
def detect(gpu: str | None, out: Output) -> None:
    """The GPUs here: memory, who uses it, what each computes natively. Of a named GPU the same facts, with no
    hardware needed; `list` shows all names.

    \b
    quant detect
    quant detect --gpu L40S-48GB --json
    """
    from quant.commands.render import planning
    from quant.hardware import detect as look
    from quant.hardware import gpu_names, named_gpu
    from quant.vllm.kernels import gpu_dict

    if gpu == "list":
        names = gpu_names()
        out.result({"names": names}, lambda console: console.print("\n".join(names)))
        return
    if gpu is not None:
        gpus: tuple[Gpu, ...] = (named_gpu(gpu),)
        out.result({"gpus": [gpu_dict(g) for g in gpus]}, lambda console: planning.show_gpus(gpus, console))
    else:
        detection = look()
        gpus = detection.gpus
        out.result(
            detection.to_dict() | {"gpus": [gpu_dict(g) for g in gpus]},
            lambda console: planning.show_detection(detection, console),
        )
    out.details(planning.gpu_sources(gpus))
