"""Series that a vLLM server exports at ``/metrics``, by what they tell (``v1/metrics/loggers.py``,
``v1/spec_decode/metrics.py``); a test in the real server's ring holds them against the release."""

from __future__ import annotations

PREFIX = "vllm:"

#: Values of now.
GAUGES = {
    "running": "num_requests_running",
    "queue": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
}
#: What only grows.
COUNTERS = {
    "preemptions": "num_preemptions_total",
    "prompt_tokens": "prompt_tokens_total",
    "output_tokens": "generation_tokens_total",
    "prefix_queries": "prefix_cache_queries_total",
    "prefix_hits": "prefix_cache_hits_total",
    "drafts": "spec_decode_num_drafts_total",
    "draft_tokens": "spec_decode_num_draft_tokens_total",
    "accepted_tokens": "spec_decode_num_accepted_tokens_total",
}
#: Distributions in seconds; their series end in ``_bucket``, ``_sum`` and ``_count``.
HISTOGRAMS = {
    "ttft": "time_to_first_token_seconds",
    "itl": "inter_token_latency_seconds",
    "tpot": "request_time_per_output_token_seconds",
    "e2el": "e2e_request_latency_seconds",
}
#: The engine's cache, as labels of a series that is always 1.
CACHE_CONFIG = "cache_config_info"
