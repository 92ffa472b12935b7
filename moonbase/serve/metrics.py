"""Numbers for Prometheus at /metrics. Every app has a registry of its own: two in one process do not mix.

Counts of the engine (queue, cache, preemptions) are read when they are asked for; what concerns HTTP is counted when a
request ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moonbase.engine.turn import Turn
    from moonbase.serve.gate import Record

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class EngineCollector:
    """Reads the service's statistics at the moment of the scrape."""

    def __init__(self, service: Any) -> None:
        self.service = service

    def collect(self) -> Iterator[Any]:
        """See `prometheus_client.registry.Collector`."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        numbers = self.service.statistics
        for name, words, value in (
            ("queue_requests", "Requests that wait for their first pass", numbers.waiting),
            ("running_requests", "Requests that are being computed", numbers.running),
            ("cache_blocks", "Blocks of the latent cache", numbers.blocks_total),
            ("cache_blocks_used", "Blocks that running requests hold", numbers.blocks_used),
            ("cache_usage_ratio", "Share of the cache in use", numbers.blocks_used / max(numbers.blocks_total, 1)),
            ("prefix_cache_hit_ratio", "Share of all prompt tokens that were in the cache already",
             numbers.cached_tokens / max(numbers.prompt_tokens, 1)),
        ):
            yield GaugeMetricFamily(f"moonbase_{name}", words, value=value)
        for name, words, value in (
            ("prompt_tokens", "Prompt tokens of admitted requests", numbers.prompt_tokens),
            ("cached_prompt_tokens", "Prompt tokens found in the cache", numbers.cached_tokens),
            ("generated_tokens", "Tokens generated", numbers.generated_tokens),
            ("drafted_tokens", "Tokens guessed ahead by multi-token prediction", numbers.drafted_tokens),
            ("accepted_draft_tokens", "Guessed tokens that were right", numbers.accepted_tokens),
            ("preemptions", "Requests put back because blocks ran out", numbers.preemptions),
        ):
            yield CounterMetricFamily(f"moonbase_{name}", words, value=value)
        finished = CounterMetricFamily("moonbase_finished", "Sequences by the engine's reason", labels=["reason"])
        for reason, count in sorted(numbers.finished.items()):
            finished.add_metric([reason], count)
        yield finished


class Metrics:
    """The registry and what is observed."""

    def __init__(self, service: Any) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(service))
        self.requests = Counter("moonbase_requests", "HTTP requests", ["route", "status"], registry=self.registry)
        self.open = Gauge("moonbase_open_requests", "Answers under way", registry=self.registry)
        self.seconds = Histogram("moonbase_request_seconds", "Arrival of a request to the end of its answer",
                                 ["route"], buckets=REQUEST_BUCKETS, registry=self.registry)
        self.first_token = Histogram("moonbase_time_to_first_token_seconds", "Arrival of a request to its first token",
                                     buckets=FIRST_TOKEN_BUCKETS, registry=self.registry)
        self.per_token = Histogram("moonbase_time_per_output_token_seconds", "Between tokens of one sequence, mean",
                                   buckets=PER_TOKEN_BUCKETS, registry=self.registry)

    def request_ended(self, record: Record, seconds: float) -> None:
        """Count one HTTP request."""
        self.requests.labels(record.route, str(record.status)).inc()
        self.seconds.labels(record.route).observe(seconds)

    def turns_ended(self, turns: Sequence[Turn], started: float) -> None:
        """Times of a request's choices; `started` on the monotonic clock."""
        first = [turn.first_time for turn in turns if turn.first_time is not None]
        if first:
            self.first_token.observe(min(first) - started)
        for turn in turns:
            if turn.completion_tokens > 1 and turn.first_time is not None and turn.last_time is not None:
                self.per_token.observe((turn.last_time - turn.first_time) / (turn.completion_tokens - 1))

    def text(self) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
