"""Prometheus names: vLLM's verbatim, `tandem:` for what vLLM lacks. prometheus_client adds `_total` to counters."""

from __future__ import annotations

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
LORA_REQUESTS_INFO = "vllm:lora_requests_info"
PREEMPTIONS = "vllm:num_preemptions"
PROMPT_TOKENS = "vllm:prompt_tokens"
PROMPT_TOKENS_CACHED = "vllm:prompt_tokens_cached"
GENERATION_TOKENS = "vllm:generation_tokens"
REQUEST_SUCCESS = "vllm:request_success"
PREFIX_QUERIES = "vllm:prefix_cache_queries"
PREFIX_HITS = "vllm:prefix_cache_hits"
PREFIX_HIT_TOKENS = "tandem:prefix_hit_tokens"
PREFIX_EVICTIONS = "tandem:prefix_evictions"
PREFIX_MISSES = "tandem:prefix_misses"
PREFIX_CHECKS = "tandem:prefix_checks"
PREFIX_ARCHIVE_ERRORS = "tandem:prefix_archive_errors"
PREFIX_BLOCKS = "tandem:prefix_blocks"
PREFIX_BYTES = "tandem:prefix_bytes"
TTFT = "vllm:time_to_first_token_seconds"
ITL = "vllm:inter_token_latency_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"
E2E = "vllm:e2e_request_latency_seconds"
QUEUE_TIME = "vllm:request_queue_time_seconds"
PREFILL_TIME = "vllm:request_prefill_time_seconds"
DECODE_TIME = "vllm:request_decode_time_seconds"
REQUEST_PROMPT_TOKENS = "vllm:request_prompt_tokens"
REQUEST_GENERATION_TOKENS = "vllm:request_generation_tokens"
ITERATION_TOKENS = "vllm:iteration_tokens_total"

SPEC_DRAFTS = "vllm:spec_decode_num_drafts"
SPEC_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens"
SPEC_ACCEPTED_TOKENS = "vllm:spec_decode_num_accepted_tokens"
SPEC_ACCEPTED_PER_POS = "vllm:spec_decode_num_accepted_tokens_per_pos"

WORKER_UP = "tandem:worker_up"
WORKER_RESTARTS = "tandem:worker_restarts"
RESYNCHRONISATIONS = "tandem:resynchronisations"
STEP_PHASE = "tandem:step_phase_seconds"
BATCH_OCCUPANCY = "tandem:batch_occupancy"
CANCELLED = "tandem:requests_cancelled"
REJECTED = "tandem:requests_rejected"
DROPPED_MESSAGES = "tandem:dropped_messages"
MEMORY_BYTES = "tandem:memory_bytes"
DRAFT_SECONDS = "tandem:draft_seconds"
SPEC_FALLTHROUGH = "tandem:spec_fallthrough"
SPEC_CHOSEN_K = "tandem:spec_draft_tokens_chosen"
SPEC_ROUND_SECONDS = "tandem:spec_round_seconds"
SPEC_ARRIVAL_SECONDS = "tandem:spec_arrival_seconds"
FEATURE_BYTES = "tandem:feature_bytes"

TIME_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
               20.0, 40.0, 80.0)  # fmt: skip
LATENCY_BUCKETS = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
480.0,
                   960.0, 1920.0, 7680.0)  # fmt: skip
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
PHASE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
OCCUPANCY_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
