"""Everything that is vLLM's, and nothing else: the only room that knows one of its releases, a compute
capability that its kernels need, or the name of a layer that it fuses.

=================  ===========================================================================================
``layers``         which of the file's linears become one layer, how tensor parallelism cuts them
``kernels``        which number formats and group sizes it computes with, from which compute capability on
``releases``       how each release accounts for memory, and what it loads
``config``         config.json as it is read: the text part, the quantization, the dtype, the context
``cache``          names and rules of the scales of an FP8 KV cache
``arguments``      the engine arguments that a checkpoint decides
=================  ===========================================================================================

Where a fact is from stands beside it. No torch, no vLLM: planning and verification read this room too.
"""
