"""What a folder or file is that is no checkpoint of safetensors, and what to do with it. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from quant.documents import read_document

#: Beginning of a file that git-lfs left in place of the real one.
LFS = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html")
#: Weight files that stand beside a model without being part of it.
FOREIGN_WEIGHTS = re.compile(r"^(consolidated|adapter_|optimizer|scheduler|trainer|training_|random_states)")
_LORA = re.compile(r"(^|\.)lora_(embedding_)?[AB](\.|$)")
_OPTIMIZER = re.compile(r"(^|\.)(exp_avg(_sq)?|momentum_buffer|max_exp_avg_sq)(\.|$)")
_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{path}', dtype='auto').save_pretrained('NEW'); "
    "T.from_pretrained('{path}').save_pretrained('NEW')\""
)
#: Ending of a weight file → what it is, and the next step.
_CONTAINERS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".gguf",), "a GGUF file of llama.cpp", "fetch the original in safetensors, of which it was made"),
    ((".nemo",), "a NeMo archive", "export it to Hugging Face's layout with NeMo's own converter"),
    ((".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".npz"), "weights of another framework",
     "fetch the same model in safetensors"),
    ((".distcp",), "shards of a distributed training checkpoint",
     "merge them with accelerate merge-weights FOLDER NEW, or save the model with save_pretrained"),
    ((".bin", ".pt", ".pth", ".ckpt"), "pickled weights, which can run code when they are loaded",
     "fetch the safetensors of the same model, or, where you trust the file, convert it: " + _CONVERT),
)  # fmt: skip


def not_itself(head: bytes) -> str | None:
    """What a file is that begins with these bytes, where it is no file of the model at all."""
    if head.startswith(LFS):
        return (
            "is a pointer of Git LFS, not the file itself: run git lfs pull in its folder, or download the "
            "model with the Hub's own client"
        )
    if head.lstrip()[:9].lower().startswith(_PAGES):
        return "is a web page, not the file itself: the download went wrong, fetch it again"
    return None


def described(path: Path) -> str:
    """What a path is that holds no checkpoint, and what to do with it: the end of a message."""
    if not path.is_dir():
        for endings, what, step in _CONTAINERS:
            if path.name.endswith(endings):
                return f"is {what}: {step.format(path=path.parent)}"
        if path.name.endswith(".safetensors"):
            return "is one file of a model: give its folder, which has config.json too"
        return "is a file: give the folder with config.json and the safetensors files"
    names = sorted(f.name for f in path.iterdir())
    if "adapter_config.json" in names:
        return f"is an adapter (LoRA){_base(path / 'adapter_config.json')}: {_MERGE}"
    raw = [n for n in names if n.startswith("consolidated") or n == "params.json"]
    if raw and any(n.startswith("consolidated") for n in raw):
        return (
            f"holds the model in its maker's own layout ({raw[0]}), whose tensors have other names: fetch "
            "the model-….safetensors and config.json of the same repository, or convert it with the "
            "script of transformers for its family"
        )
    if "model_index.json" in names:
        return "is a pipeline of diffusers, no language model: give the folder of one"
    if any(n in names for n in ("trainer_state.json", "optimizer.pt", "latest")) or any(
        re.match(r"global_step\d+$", n) for n in names
    ):
        has_model = [n for n in names if n.endswith(".safetensors") and not FOREIGN_WEIGHTS.match(n)]
        if not has_model:
            return (
                "is the state of a training, without the model's weights in safetensors: merge them "
                "(DeepSpeed: python zero_to_fp32.py . NEW; FSDP: accelerate merge-weights), or give the "
                "folder that save_pretrained wrote"
            )
    for endings, what, step in _CONTAINERS:
        matching = [
            n for n in names if n.endswith(endings) and not n.startswith(("training_args", "rng_state"))
        ]
        if matching:
            return f"holds only {what} ({matching[0]}): {step.format(path=path)}"
    inside = [n for n in names if (path / n / "config.json").is_file()]
    if inside:
        return f"has no model itself; one lies in {path / inside[-1]}: give that folder"
    if "config.json" not in names:
        return "has no config.json: give the folder of a Hugging Face checkpoint"
    return "has no .safetensors file: the download is incomplete or this is not a model"


_MERGE = (
    "merge it into its base (peft: model.merge_and_unload().save_pretrained('NEW')) and quantize that, or "
    "serve it beside a quantized base with vllm serve BASE --enable-lora"
)


def _base(config: Path) -> str:
    try:
        name = read_document(config).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" of {name}" if isinstance(name, str) and name else ""


def no_model(tensors: Iterable[str]) -> str | None:
    """What a file's tensors are, where they are no model: an adapter's, or an optimizer's. A model whose
    adapters are part of it (Phi-4 multimodal) has its own matrices as ``base_layer``."""
    names = list(tensors)
    lora = [n for n in names if _LORA.search(n)]
    if lora and not any(".base_layer." in n for n in names):
        return f"holds matrices of an adapter ({lora[0]}): {_MERGE}"
    state = next((n for n in names if _OPTIMIZER.search(n)), None)
    if state is not None:
        return (
            f"holds the state of an optimizer ({state}): give the folder that the model itself was saved in, "
            "with save_pretrained"
        )
    return None
