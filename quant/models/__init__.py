"""Model families: rows that say how blocks are laid out, and the machine that runs one block at a time."""

from quant.models.adapter import LlamaAdapter, ModelAdapter, ModelRegistry, QwenAdapter, adapter_for

__all__ = ["LlamaAdapter", "ModelAdapter", "ModelRegistry", "QwenAdapter", "adapter_for"]
