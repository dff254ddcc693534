"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from glm_jax.serve.service import Service

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class _EngineMetrics(Collector):
    """The service's status, as it is when Prometheus asks."""

    def __init__(self, service: Service):
        self._service = service

    def collect(self) -> Iterator[Metric]:
        status = self._service.status
        yield GaugeMetricFamily("glm_requests_waiting", "Requests in the queue.", status.waiting)
        yield GaugeMetricFamily("glm_requests_running", "Requests in the batch.", status.running)
        yield GaugeMetricFamily(
            "glm_free_pages", "Pages of the key-value cache that nobody holds.", status.free_pages
        )
        yield GaugeMetricFamily(
            "glm_weights_version", "Swaps of weights since the start.", status.weights_version
        )
        yield CounterMetricFamily(
            "glm_prompt_tokens", "Tokens of prompts, for each sample.", status.prompt_tokens
        )
        yield CounterMetricFamily("glm_generated_tokens", "Tokens sampled.", status.sampled_tokens)
        yield CounterMetricFamily(
            "glm_decode_passes",
            "Passes of the trunk in which finished requests drew.",
            status.passes,
        )
        yield CounterMetricFamily(
            "glm_accepted_drafts",
            "Draft tokens among those that finished requests drew.",
            status.accepted_drafts,
        )
        finished = CounterMetricFamily(
            "glm_finished", "Samples by what ended them.", labels=["reason"]
        )
        for reason, count in status.finished:
            finished.add_metric([reason], count)
        yield finished


class ServerMetrics:
    """One registry a server."""

    def __init__(self, service: Service):
        self._registry = prometheus_client.CollectorRegistry()
        self._registry.register(_EngineMetrics(service))
        self.requests = prometheus_client.Counter(
            "glm_http_requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        self.first_token_seconds = prometheus_client.Histogram(
            "glm_time_to_first_token_seconds",
            "From submission to the first token of a request.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)
