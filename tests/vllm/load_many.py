"""Run by vLLM's own interpreter: builds vLLM's model for each checkpoint of a JSON list, loads the file into
it, and prints which parameters the file left as they were, a line each.

That proves names, shapes and completeness on any machine, also of what its CPU build has no kernel for: the
choice of a kernel is answered for a GPU, and no kernel is ever run. Parameters are filled with one byte
before the file is loaded, and with another before it is loaded again: an element that holds both bytes came
from nowhere.
"""

import importlib
import json
import os
import sys

from inside import build_models_in_this_process, each_in_a_child, stand_in_for_torchvision

_SCHEMES = "vllm.model_executor.layers.quantization.compressed_tensors"
#: Modules of mixtures' methods: how each asks for a backend, and what it is told.
_BACKENDS = {
    "w4a4_nvfp4": ("select_nvfp4_moe_backend", "NvFp4MoeBackend", "MARLIN"),
    "w8a8_fp8": ("select_fp8_moe_backend", "Fp8MoeBackend", "TRITON"),
    "w8a8_int8": ("select_int8_moe_backend", "Int8MoeBackend", "TRITON"),
    "wna16": ("select_wna16_moe_backend", "WNA16MoEBackend", "MARLIN"),
}
#: Modules of linears' methods, and how each asks for a kernel.
_KERNELS = {
    "w4a4_nvfp4": "init_nvfp4_linear_kernel",
    "w8a8_fp8": "init_fp8_linear_kernel",
    "w8a8_int8": "init_int8_linear_kernel",
    "wNa16": "choose_mp_linear_kernel",
}
#: Parameters that vLLM fills itself where a file has none: scales of a cache, order of columns.
_OWN = ("k_scale", "v_scale", "q_scale", "prob_scale", "_zero_point", "g_idx", "g_idx_sort_indices")


class _Kernel:
    """Stands for whichever kernel a GPU would choose."""

    def __init__(self, *args, **options):
        pass

    def __getattr__(self, name):
        return lambda *args, **options: None


def _answer_for_a_gpu():
    for name, (question, kind, member) in _BACKENDS.items():
        module = importlib.import_module(f"{_SCHEMES}.compressed_tensors_moe.compressed_tensors_moe_{name}")
        oracle = sys.modules[getattr(module, question).__module__]
        backend = getattr(oracle, kind)[member]
        setattr(module, question, lambda *args, _answer=backend, **options: (_answer, None))
    for name, question in _KERNELS.items():
        module = importlib.import_module(f"{_SCHEMES}.schemes.compressed_tensors_{name}")
        answer = _Kernel if question.startswith("choose") else _Kernel()
        setattr(module, question, lambda *args, _answer=answer, **options: _answer)


def load(job):
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=job["path"], dtype="bfloat16", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True,
        disable_log_stats=True, enable_prefix_caching=False,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "file://" + job["log"] + ".group", 0, "gloo")
        initialize_model_parallel(1)
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(torch.bfloat16), torch.device("cpu"):
            model = initialize_model(vllm_config=config, model_config=config.model_config)
        left = {}
        for byte in (0x55, 0xAA):
            for parameter in model.parameters():
                parameter.data.view(torch.uint8).fill_(byte) if parameter.ndim else parameter.data.fill_(byte)
            model.load_weights(loader.get_all_weights(config.model_config, model))
            for name, parameter in model.named_parameters():
                fresh = torch.empty_like(parameter.data)
                fresh.view(torch.uint8).fill_(byte) if fresh.ndim else fresh.fill_(byte)
                same = _bits(parameter.data) == _bits(fresh)
                left[name] = left.get(name, True) & same
    methods = {
        n: getattr(m, "quant_method", None) for n, m in model.named_modules() if isinstance(m, LinearBase)
    }
    plain = {n for n, m in methods.items() if m is None or isinstance(m, UnquantizedLinearMethod)}
    experts = [
        type(m.quant_method).__name__
        for m in model.modules()
        if "Expert" in type(m).__name__ and getattr(m, "quant_method", None) is not None
    ]
    return {
        "unfilled": {
            n: int(x.sum()) for n, x in left.items() if x.any() and not n.endswith(_OWN)
        },
        "quantized": sorted(set(methods) - plain), "plain": sorted(plain), "experts": experts,
    }  # fmt: skip


def _bits(tensor):
    import torch

    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()])


def main():
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")
    stand_in_for_torchvision()
    build_models_in_this_process()
    import vllm.entrypoints.llm  # before the first fork: it takes most of the time  # noqa: F401

    _answer_for_a_gpu()
    each_in_a_child(json.load(open(sys.argv[1])), load)


if __name__ == "__main__":
    main()
