"""What Prometheus is told."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

from .requests import Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _EngineCollector(Collector):
    """The numbers of the engine, whatever they are, when Prometheus asks."""

    def __init__(self, statistics: Callable[[], Any]) -> None:
        self._statistics = statistics

    def describe(self) -> list[GaugeMetricFamily]:
        return []  # else registration would ask the engine

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in asdict(self._statistics()).items():
            words = name.replace("_", " ")
            yield GaugeMetricFamily(f"flashsloth_engine_{name}", f"Of the engine: {words}.", value=value)


class Metrics:
    """Of one server; several may live in a process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, in_flight: Callable[[], int], ready: Callable[[], bool], statistics: Callable[[], Any]) -> None:
        registry = self._registry = CollectorRegistry()
        registry.register(_EngineCollector(statistics))
        self.requests = Counter(
            "flashsloth_requests", "HTTP requests by path and status.", ["path", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            "flashsloth_request_seconds",
            "From a chat request to the end of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "flashsloth_first_text_seconds",
            "From a chat request to the first text of its answer.",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "flashsloth_tokens",
            "Tokens of finished answers; cached and visual ones are part of the prompt.",
            ["kind"],
            registry=registry,
        )
        self.stage_seconds = Counter(
            "flashsloth_stage_seconds", "Seconds of finished answers by stage.", ["stage"], registry=registry
        )
        self.cancelled = Counter("flashsloth_cancelled", "Clients that hung up.", registry=registry)
        Gauge("flashsloth_in_flight", "Chat requests under way.", registry=registry).set_function(in_flight)
        Gauge("flashsloth_ready", "1 where the engine answers.", registry=registry).set_function(ready)

    def count(self, usages: Iterable[Usage]) -> None:
        """Finished answers."""
        for usage in usages:
            self.tokens.labels("prompt").inc(usage.prompt_tokens)
            self.tokens.labels("cached").inc(usage.cached_tokens)
            self.tokens.labels("visual").inc(usage.visual_tokens)
            self.tokens.labels("completion").inc(usage.completion_tokens)
            for stage, seconds in usage.seconds.items():
                self.stage_seconds.labels(stage).inc(max(0.0, seconds))

    def text(self) -> bytes:
        return generate_latest(self._registry)
