"""What a scraper reads, under the names that TensorFlow Serving gives."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram

LATENCIES = [10 * 1.8**i for i in range(33)]  # microseconds, the server's buckets
SIZES = [0, *(2**i for i in range(12))]
PREFIX = ":tensorflow:serving:"


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self):
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "request_count", "Requests answered.", ["model_name", "status"]
        )
        labels = ["model_name", "API", "entrypoint"]
        self.request_latency = self._histogram(
            "request_latency", "Microseconds of a request.", labels
        )
        labels = ["model_name", "API", "runtime"]
        self.runtime_latency = self._histogram(
            "runtime_latency", "Microseconds in the session.", labels
        )
        self.queuing_latency = self._histogram(
            "batching_session:queuing_latency", "Microseconds in the queue."
        )
        self.processed_batch_size = self._histogram(
            "batching_session:processed_batch_size",
            "Rows that the session was given.",
            buckets=SIZES,
        )
        self.padding_size = self._histogram(
            "batching_session:padding_size", "Rows that were padding.", buckets=SIZES
        )
        self.runtime_restarts = self._counter(
            "runtime_restarts", "Times that the session's process was started anew."
        )

    def text(self) -> bytes:
        """All of it in the text format."""
        text = prometheus_client.generate_latest(self.registry)
        for name in (b"request_count", b"runtime_restarts"):
            text = text.replace(name + b"_total", name)  # the server's have no suffix
        return text

    def _counter(self, name, text, labels=()):
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name, text, labels=("model_name",), buckets=LATENCIES):
        return Histogram(
            PREFIX + name, text, labels, registry=self.registry, buckets=buckets
        )
