"""What the service counts, in the text format of Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dl_jax.serve.drift import Drift
from dl_jax.serve.runtime import Model

PATHS = ("/predict", "/explain")
STATUSES = (200, 400, 500, 503, 504)  # that a server under way may give
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DRIFT = {  # field of Drift -> help
    "examples": "examples in the window that is compared with the validation data",
    "mean": "mean of the inputs' values",
    "std": "standard deviation of the inputs' values",
    "shift": "mean of the inputs less that in validation, in standard deviations of the values there",
    "spread": "standard deviation of the inputs divided by that in validation",
    "answers": "total variation between the distributions of answers now and in validation",
    "confidence": "mean confidence less that in validation",
}


class Metrics:
    """Counters of one service, in a registry of its own."""

    def __init__(self, drift: Callable[[], Drift], running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = {"namespace": "dl_jax", "registry": self.registry}
        self.requests = Counter("requests", "requests that ended, by HTTP status", ["path", "status"], **own)
        for path in PATHS:
            for status in STATUSES:  # from 0, so that the rate of the first error is seen
                self.requests.labels(path, status)
        self.seconds = Histogram("request_seconds", "time until the answer", ["path"], buckets=SECONDS, **own)
        self.rows = Histogram("batch_rows", "rows of a call of the model", buckets=ROWS, **own)
        Gauge("requests_running", "requests that were not answered yet", **own).set_function(running)
        self.answers = Counter("answers", "rows that were answered by this class", ["class"], **own)
        self.swaps = Counter("swaps", "new files, by whether they were taken over", ["result"], **own)
        self._model = Gauge("model_info", "1 for the file that answers", ["version", "format"], **own)
        for field, text in DRIFT.items():
            gauge = Gauge(f"drift_{field}", text, **own)
            gauge.set_function(lambda field=field: getattr(drift(), field))

    def show(self, model: Model) -> None:
        """Names the file that answers from now on."""
        self._model.clear()
        self._model.labels(model.version, model.record.format).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
