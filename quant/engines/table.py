"""The engines, a row each, and what each reads. Facts are of the release that a row names:

* vLLM: :mod:`quant.vllm`, which knows much more of it.
* SGLang 0.5.23: its wheel. Quantization: ``srt/layers/quantization`` (``get_min_capability`` of each scheme;
  ``_get_scheme_from_parts`` of ``compressed_tensors.py``, which knows no microscaling layout for linears and
  serves NVFP4 below 10.0 as packed weights; ``query_marlin_supported_quant_types``: zero points in 4 bits
  alone; INT8 experts on NPUs alone; plain ``gptq`` is registered for no GPU, only ``gptq_marlin``). The INT8
  product has kernels from 8.0 to 9.0 (``sgl-kernel/csrc/gemm/int8_gemm_kernel.cu``). Flags:
  ``srt/arg_groups/fields``. Its attention takes 7.5 (documentation, Installation). On AMD its Marlin paths
  are not built. Images: ``lmsysorg/sglang``, AMD's by architecture (documentation, AMD GPUs).
* TGI 3.3.7, its last release; its README says that it is in maintenance mode. Quantization:
  ``server/text_generation_server/layers`` (``compressed_tensors/loader.py``, ``marlin/gptq.py``: from 8.0;
  ``fp8.py``: Marlin on 8.x); it names no generation after 9.0. Flags: ``launcher/src/main.rs``. That
  ``--quantize fp8`` would also round what a native fp8 file leaves in 16 bits (``to_fp8``) is why that layout
  is not listed.
* TensorRT-LLM 1.2.1, its last stable release: documentation, features/quantization (hardware matrix) and
  commands/trtllm-serve; ``_torch/model_config.py::load_hf_quant_config`` (blocks of 128 × 128 of a native fp8
  file), and ``hf_quant_config.json`` of ModelOpt. Its release candidates of 1.3 read compressed-tensors with
  FP8 channels, FP8 blocks and NVFP4 too, which 1.2's documentation does not name. gpt-oss in its own MXFP4
  on Hopper and later: OpenAI's guide to it (cookbook, "run-nvidia").
* llama.cpp b11434: ``common/arg.cpp``, ``docs/docker.md``, ``conversion/base.py``. It reads GGUF alone.
* Ollama 0.20.3: ``docs/faq.mdx``, ``docs/modelfile.mdx``, ``envconfig/config.go``. A context that a Modelfile
  states goes before ``OLLAMA_CONTEXT_LENGTH``. Split files: its issue 5245, open.
"""

from __future__ import annotations

from quant.engines.base import MARLIN_GROUPS, UNQUANTIZED, Engine, Flag, ImageUser, Reading
from quant.vllm.releases import VLLM_VERSION

_DTYPES = ("float16", "bfloat16")
_MANY = ("cuda", "rocm")
#: What to do with a layout or scheme that one of several does not read.
_ANOTHER = (
    "quant export-vllm writes another layout of the same numbers (--format); another scheme is made from the "
    "source by quant quantize --scheme"
)

VLLM = Engine(
    name="vllm",
    title="vLLM",
    release=f"{VLLM_VERSION}.0",
    program=("vllm", "serve"),
    images={
        "cuda": "vllm/vllm-openai:v{release}",
        "rocm": "vllm/vllm-openai-rocm:v{release}",
        "cpu": "vllm/vllm-openai-cpu:v{release}",
    },
    key_variable="VLLM_API_KEY",
    diagnosed=True,
    environment={"VLLM_NO_USAGE_STATS": "1"},
    otherwise="all",
    about="what `quant list schemes` shows",
    drain="shutdown-timeout",
    # its documentation, deployment/docker, "Run as a non-root user"
    user=ImageUser(uid=2000, gid=0, home="/home/vllm"),
    container="vllm",
    cache_variable="VLLM_CPU_KVCACHE_SPACE",
    kinds=None,
)

SGLANG = Engine(
    name="sglang",
    title="SGLang",
    release="0.5.23",
    program=("python3", "-m", "sglang.launch_server", "--model-path"),
    images={
        "cuda": "lmsysorg/sglang:v{release}",
        "gfx942": "lmsysorg/sglang:v{release}-rocm720-mi30x",
        "gfx950": "lmsysorg/sglang:v{release}-rocm720-mi35x",
    },
    enters=False,
    flags={
        "dtype": Flag("dtype"),
        "max-model-len": Flag("context-length"),
        "tensor-parallel-size": Flag("tensor-parallel-size", aliases=("tp-size", "tp")),
        "gpu-memory-utilization": Flag(
            "mem-fraction-static", note="SGLang's share is of weights and cache; activations come on top"
        ),
        "kv-cache-dtype": Flag("kv-cache-dtype", {"fp8": "fp8_e4m3", "auto": None}),
        "max-num-seqs": Flag("max-running-requests"),
        "served-model-name": Flag("served-model-name"),
        "trust-remote-code": Flag("trust-remote-code"),
        "host": Flag("host"),
        "port": Flag("port"),
    },
    model_aliases=("model",),
    always=(("enable-metrics", True, "/metrics for Prometheus"),),
    reads=(
        Reading(UNQUANTIZED, _DTYPES, (7, 5), platforms=_MANY),
        Reading("compressed-tensors", ("w4a16", "w4a16-asym", "w8a16"), (8, 0), groups=MARLIN_GROUPS),
        Reading("compressed-tensors", ("w8a8-int8",), (8, 0), (10, 0), experts=False),
        Reading("compressed-tensors", ("w8a8-fp8", "w8a8-fp8-tensor"), (8, 0), platforms=_MANY),
        Reading("compressed-tensors", ("fp8-block",), (8, 9), platforms=_MANY),
        Reading("compressed-tensors", ("w8a16-fp8",), (8, 0)),
        Reading("compressed-tensors", ("nvfp4", "nvfp4a16"), (8, 0)),
        Reading("gptq", ("w4a16", "w8a16"), (8, 0), groups=MARLIN_GROUPS),
        Reading("awq", ("w4a16-asym",), (8, 0), groups=MARLIN_GROUPS),
        Reading("fp8", ("w8a8-fp8-tensor", "fp8-block"), (8, 9), platforms=_MANY),
        Reading("modelopt", ("w8a8-fp8-tensor",), (8, 9)),
        Reading("modelopt", ("nvfp4",), (10, 0)),
        Reading("mxfp4", ("mxfp4a16", "mxfp4"), (8, 0)),
    ),
    exports=_ANOTHER,
)

TGI = Engine(
    name="tgi",
    title="TGI",
    release="3.3.7",
    program=("text-generation-launcher", "--model-id"),
    images={
        "cuda": "ghcr.io/huggingface/text-generation-inference:{release}",
        "rocm": "ghcr.io/huggingface/text-generation-inference:{release}-rocm",
    },
    flags={
        "dtype": Flag("dtype"),
        "max-model-len": Flag("max-total-tokens"),
        "tensor-parallel-size": Flag("num-shard"),
        "gpu-memory-utilization": Flag("cuda-memory-fraction"),
        "kv-cache-dtype": Flag(
            "kv-cache-dtype", {"fp8": "fp8_e4m3fn", "fp8_e4m3": "fp8_e4m3fn", "auto": None}
        ),
        "max-num-seqs": Flag("max-batch-size"),
        "trust-remote-code": Flag("trust-remote-code"),
        "host": Flag("hostname"),
        "port": Flag("port", aliases=("p",)),
    },
    says_one_rank=True,
    drain="graceful-termination-timeout",
    always=(("usage-stats", "off", "nothing is reported to anybody"),),
    key_variable="API_KEY",
    model_name=False,
    reads=(
        Reading(UNQUANTIZED, _DTYPES, None, platforms=_MANY, tried=9),
        Reading(
            "compressed-tensors", ("w4a16", "w4a16-asym", "w8a16"), (8, 0), groups=MARLIN_GROUPS,
            experts=False, tried=9,
        ),
        Reading("compressed-tensors", ("w8a8-fp8", "w8a8-fp8-tensor"), (8, 0), experts=False, tried=9),
        Reading("compressed-tensors", ("w8a8-int8",), None, experts=False, tried=9),
        Reading("gptq", ("w4a16", "w8a16"), (8, 0), groups=MARLIN_GROUPS, tried=9),
        Reading("awq", ("w4a16-asym",), (8, 0), groups=MARLIN_GROUPS, tried=9),
    ),
    exports=_ANOTHER,
)  # fmt: skip

TENSORRT_LLM = Engine(
    name="tensorrt-llm",
    title="TensorRT-LLM",
    release="1.2.1",
    program=("trtllm-serve",),
    images={"cuda": "nvcr.io/nvidia/tensorrt-llm/release:{release}"},
    enters=False,
    flags={
        "dtype": Flag(instead="trtllm-serve computes in the dtype of config.json: change it there"),
        "max-model-len": Flag("max_seq_len"),
        "tensor-parallel-size": Flag("tp_size"),
        "gpu-memory-utilization": Flag(
            instead="trtllm-serve takes a share of what the weights leave, which is another number: pass it "
            "on with -- --kv_cache_free_gpu_memory_fraction F"
        ),
        "kv-cache-dtype": Flag(
            values={"auto": None},
            instead="trtllm-serve reads it from a YAML file: write kv_cache_config: {dtype: fp8} into one "
            "and pass it on with -- --config FILE",
        ),
        "max-num-seqs": Flag("max_batch_size"),
        "host": Flag("host"),
        "port": Flag("port"),
    },
    takes_key=False,
    model_name=False,
    strict=True,
    reads=(
        Reading(UNQUANTIZED, ("bfloat16", "float16"), (8, 0)),
        Reading("fp8", ("fp8-block",), (9, 0), (12, 0)),
        Reading("modelopt", ("w8a8-fp8-tensor",), (8, 9)),
        Reading("modelopt", ("nvfp4",), (10, 0)),
        Reading("mxfp4", ("mxfp4a16", "mxfp4"), (9, 0)),
    ),
    exports="quantize the source with --scheme fp8-block --format fp8, which it reads on Hopper and on B200 "
    "and B300, or with NVIDIA's ModelOpt, whose checkpoints it reads; it also serves the source itself",
)

LLAMA_CPP = Engine(
    name="llama.cpp",
    title="llama.cpp",
    release="b11434",
    program=("llama-server", "--model"),
    images={
        "cuda": "ghcr.io/ggml-org/llama.cpp:server-cuda-{release}",
        "rocm": "ghcr.io/ggml-org/llama.cpp:server-rocm-{release}",
        "cpu": "ghcr.io/ggml-org/llama.cpp:server-{release}",
    },
    flags={
        "max-model-len": Flag("ctx-size", note="llama.cpp's is of all requests together", aliases=("c",)),
        "tensor-parallel-size": Flag(
            instead="llama.cpp spreads the layers over every GPU that it sees: leave --tensor-parallel out, "
            "or pass on -- --split-mode row"
        ),
        "gpu-memory-utilization": Flag(
            instead="llama.cpp fits what is not asked for into the memory that is free, by a margin in MiB: "
            "pass it on with -- --fit-target MIB"
        ),
        "kv-cache-dtype": Flag(
            values={"auto": None},
            instead="llama.cpp has no FP8 cache: pass on -- --cache-type-k q8_0 --cache-type-v q8_0",
        ),
        "max-num-seqs": Flag("parallel", aliases=("np",)),
        "served-model-name": Flag("alias", aliases=("a",)),
        "host": Flag("host"),
        "port": Flag("port"),
    },
    model_aliases=("m",),
    always=(
        ("metrics", True, "/metrics for Prometheus"),
        ("offline", True, "nothing is fetched"),
    ),
    key_variable="LLAMA_API_KEY",
    otherwise="GGUF files alone",
    files=True,
    probe=("curl", "-fsS", "-m", "5", "{url}"),  # its image has no Python
    exports="quant export-gguf -m SOURCE -o MODEL.gguf --level q4_k_m makes the file that it reads; without "
    "--level the codes of a quantized checkpoint are kept where the file can hold them. Then: quant-deploy "
    "plan -m MODEL.gguf --engine llama.cpp",
)

OLLAMA = Engine(
    name="ollama",
    title="Ollama",
    release="0.20.3",
    program=("ollama", "serve"),
    images={
        "cuda": "ollama/ollama:{release}",
        "rocm": "ollama/ollama:{release}-rocm",
        "cpu": "ollama/ollama:{release}",
    },
    by_variables=True,
    flags={
        "max-model-len": Flag("num_ctx"),
        "tensor-parallel-size": Flag(
            instead="Ollama takes as many GPUs as a model needs: leave --tensor-parallel out, or set "
            "OLLAMA_SCHED_SPREAD=1 where it runs, for all of them"
        ),
        "gpu-memory-utilization": Flag(
            instead="Ollama takes what is free: set OLLAMA_GPU_OVERHEAD, the bytes that it leaves free"
        ),
        "kv-cache-dtype": Flag(
            values={"auto": None},
            instead="Ollama has no FP8 cache: set OLLAMA_KV_CACHE_TYPE=q8_0 and OLLAMA_FLASH_ATTENTION=1 "
            "where it runs",
        ),
        "max-num-seqs": Flag("OLLAMA_NUM_PARALLEL"),
        "host": Flag("OLLAMA_HOST"),
    },
    always=(
        ("OLLAMA_KEEP_ALIVE", "-1", "the model stays in memory"),
        ("OLLAMA_NOPRUNE", "1", "nothing that another Ollama is fetching is removed"),
    ),
    takes_key=False,
    health="/",
    otherwise="GGUF files alone",
    files=True,
    kinds=("shell", "modelfile"),
    exports=LLAMA_CPP.exports.replace("--engine llama.cpp", "--engine ollama"),
)

ENGINES = {e.name: e for e in (VLLM, SGLANG, LLAMA_CPP, OLLAMA, TGI, TENSORRT_LLM)}
