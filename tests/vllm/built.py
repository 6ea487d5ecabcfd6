"""Which parameters of vLLM's own model does a checkpoint leave unfilled? Run by a Python that has vLLM:

    python built.py CHECKPOINT...

Each model is built and loaded in a process of its own; prints a JSON object, path → the names of parameters
that no tensor filled, or what stopped the load. Experts' kernels and libraries of images are stood in for:
what is asked is what vLLM constructs of a config and looks for in a file, not what this CPU can compute.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import os
import sys
import traceback
import types

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}

import torch


class _Anything(type):
    """A class of which every attribute and every call is such a class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *_: object, **__: object) -> type:
        return cls


class _StandIn(types.ModuleType):
    """A module that has everything."""

    __path__: list[str] = []  # noqa: RUF012 - an attribute of modules
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Images:
    """Finds libraries of images and sound that are not installed."""

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        wanted = name.split(".")[0] in ("torchvision", "torchaudio")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.append(_Images())  # type: ignore[arg-type]

import vllm.model_executor.models.registry as registry  # noqa: E402
from vllm.config import set_current_vllm_config  # noqa: E402
from vllm.distributed import init_distributed_environment, initialize_model_parallel  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.model_executor.model_loader import get_model_loader  # noqa: E402
from vllm.model_executor.model_loader.utils import initialize_model  # noqa: E402
from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: E402

registry._run_in_subprocess = lambda function: function()
_EXPERTS = "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
_wna16 = importlib.import_module(f"{_EXPERTS}.compressed_tensors_moe_wna16")
_backends = sys.modules[_wna16.select_wna16_moe_backend.__module__].WNA16MoEBackend
_wna16.select_wna16_moe_backend = lambda *a, **k: (_backends.EMULATION, None)

_mxfp4 = importlib.import_module("vllm.model_executor.layers.quantization.mxfp4")
_mxfp4.select_mxfp4_moe_backend = lambda *a, **k: (_mxfp4.Mxfp4MoeBackend.EMULATION, None)


class _Kernel:
    """Stands for whichever kernel of linears another machine would choose."""

    def __init__(self, *_: object, **__: object):
        pass

    def __getattr__(self, name: str) -> object:
        return lambda *_, **__: None


_linear = importlib.import_module(
    "vllm.model_executor.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"
)
_linear.choose_mp_linear_kernel = lambda *a, **k: _Kernel
#: No word of codes is this number; of bytes a few in a hundred are.
_INTEGER, _BY_CHANCE = -77, 0.05


def _filler(dtype: torch.dtype) -> torch.Tensor:
    """What a parameter holds before the load."""
    return torch.tensor(float("nan") if dtype.is_floating_point else _INTEGER).to(dtype)


def unfilled(path: str, port: int) -> list[str]:
    """Names of the parameters of vLLM's model that loading leaves as they were."""
    torch.set_num_threads(1)
    config = EngineArgs(
        model=path,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    ).create_engine_config()
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1)
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
        for parameter in model.parameters():
            parameter.data.fill_(_filler(parameter.dtype))
        model.load_weights(loader.get_all_weights(config.model_config, model))
    left = []
    for name, parameter in model.named_parameters():
        value = parameter.data
        empty = value.isnan() if value.dtype.is_floating_point else value == _filler(value.dtype)
        allowed = _BY_CHANCE if value.element_size() == 1 else 0
        if float(empty.float().mean()) > allowed and ".attn." not in name:
            left.append(name)
    return left


def main() -> None:
    results: dict[str, object] = {}
    for number, path in enumerate(sys.argv[1:]):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            try:
                result: object = unfilled(path, 29600 + os.getpid() % 5000 + number)
            except BaseException:
                result = traceback.format_exc()[-1500:]
            with os.fdopen(writing, "w") as stream:
                json.dump(result, stream)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as stream:
            results[path] = json.loads(stream.read() or '"the process died"')
        os.waitpid(child, 0)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
