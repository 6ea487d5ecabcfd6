"""GGUF files, as llama.cpp and Ollama read them: families, numbers, tokenizers, containers.

One file holds everything: hyperparameters and the tokenizer as typed key/value pairs, then tensors whose rows
are blocks of 32 or 256 numbers. The container, the tables of architectures and tensor names and the
arithmetic of the plain types are the ``gguf`` package's, which llama.cpp itself publishes.
"""
