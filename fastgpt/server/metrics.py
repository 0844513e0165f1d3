"""What /metrics shows: Prometheus text under the prefix fastgpt_, names as in the vLLM-like set."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric

from fastgpt.logging import get_logger
from fastgpt.request import Timings
from fastgpt.server.messages import EngineInfo, Figures

__all__ = ["Metrics"]

_logger = get_logger(__name__)

_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200,
)  # fmt: skip
_TOKEN_SECONDS = (
    0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2,
)  # fmt: skip


class Metrics:
    """Owns the registry of one server. Lives on the event loop.

    Args:
        load: returns the engine's (num_running, num_waiting, num_free_blocks) of this moment.
    """

    def __init__(self, load: Callable[[], tuple[int, int, int]]) -> None:
        self.registry = CollectorRegistry()
        self._load = load
        self._info: EngineInfo | None = None
        self._nvml: _Nvml | None = None
        self._last_figures: Figures | None = None
        r = self.registry
        self._busy = Gauge(
            "fastgpt_compute_busy",
            "Share of the last interval in which the engine computed a step.",
            registry=r,
        )
        self._fragmentation = Gauge(
            "fastgpt_memory_fragmentation",
            "1 - peak requested bytes / peak reserved bytes of the memory pool.",
            registry=r,
        )
        self._pool = Gauge(
            "fastgpt_memory_pool_bytes", "The pool's byte counts.", ["kind"], registry=r
        )
        self._preemptions = Counter(
            "fastgpt_num_preemptions", "Requests whose blocks were taken back.", registry=r
        )
        self._steps = Counter("fastgpt_engine_steps", "Steps of the engine.", registry=r)
        self._prompt_tokens = Counter("fastgpt_prompt_tokens", "Prompt tokens.", registry=r)
        self._generation_tokens = Counter(
            "fastgpt_generation_tokens", "Generated tokens.", registry=r
        )
        self._success = Counter(
            "fastgpt_request_success", "Finished requests.", ["finished_reason"], registry=r
        )
        self._rejected = Counter(
            "fastgpt_request_rejected", "Requests refused with an error.", ["status"], registry=r
        )
        self._ttft = Histogram(
            "fastgpt_time_to_first_token_seconds",
            "From arrival in the engine to the first token.",
            buckets=_SECONDS,
            registry=r,
        )
        self._tpot = Histogram(
            "fastgpt_time_per_output_token_seconds",
            "Mean time per token after the first, one value a request.",
            buckets=_TOKEN_SECONDS,
            registry=r,
        )
        self._queue = Histogram(
            "fastgpt_request_queue_time_seconds",
            "From arrival in the engine to the first scheduled step.",
            buckets=_SECONDS,
            registry=r,
        )
        self._prefill = Histogram(
            "fastgpt_request_prefill_time_seconds",
            "From the first scheduled step to the first token.",
            buckets=_SECONDS,
            registry=r,
        )
        self._decode = Histogram(
            "fastgpt_request_decode_time_seconds",
            "From the first token to the last.",
            buckets=_SECONDS,
            registry=r,
        )
        self._e2e = Histogram(
            "fastgpt_e2e_request_latency_seconds",
            "From arrival in the engine to the last token.",
            buckets=_SECONDS,
            registry=r,
        )
        self._startup = Gauge(
            "fastgpt_startup_seconds", "Time of each phase of the start.", ["phase"], registry=r
        )
        r.register(_Live(self))

    def set_engine(self, info: EngineInfo) -> None:
        """Record what the engine serves; starts watching its GPU, if it has one."""
        self._info = info
        self._startup.labels("load").set(info.load_s)
        self._startup.labels("warm_up").set(info.warm_up_s)
        if info.device.startswith("cuda"):
            self._nvml = _Nvml(int(info.device.partition(":")[2] or 0))

    def take_figures(self, figures: Figures) -> None:
        """Record the engine's counters."""
        last = self._last_figures
        if last is None or figures.clock_s - last.clock_s > 0.05:
            since = last.clock_s if last else figures.clock_s - 1.0
            busy_s = figures.busy_s - (last.busy_s if last else figures.busy_s)
            self._busy.set(min(1.0, max(0.0, busy_s / (figures.clock_s - since))))
            self._preemptions.inc(figures.num_preemptions - (last.num_preemptions if last else 0))
            self._steps.inc(figures.num_steps - (last.num_steps if last else 0))
            self._last_figures = figures
        self._fragmentation.set(figures.memory_fragmentation)
        for kind in ("budget", "reserved", "allocated", "requested"):
            if (value := figures.pool.get(f"{kind}_bytes")) is not None:
                self._pool.labels(kind).set(value)

    def count_finished(
        self, reason: str, num_prompt: int, num_generated: int, timings: Timings | None
    ) -> None:
        """Record one finished request."""
        self._success.labels(reason).inc()
        self._prompt_tokens.inc(num_prompt)
        self._generation_tokens.inc(num_generated)
        if timings is None or num_generated == 0:
            return
        self._ttft.observe(timings.ttft_s)
        self._queue.observe(timings.queue_s)
        self._prefill.observe(max(0.0, timings.ttft_s - timings.queue_s))
        self._decode.observe(max(0.0, timings.total_s - timings.ttft_s))
        self._e2e.observe(timings.total_s)
        if num_generated > 1:
            self._tpot.observe(timings.tpot_s)

    def count_rejected(self, status: int) -> None:
        """Record one refused request."""
        self._rejected.labels(str(status)).inc()

    def render(self) -> bytes:
        """Return the text of /metrics."""
        return generate_latest(self.registry)

    def live(self) -> Iterator[Metric]:
        """Yield what is read at the moment of the scrape."""
        running, waiting, free_blocks = self._load()

        def gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"fastgpt_{name}", help_text, value=value)

        yield gauge("num_requests_running", "Requests being computed.", running)
        yield gauge("num_requests_waiting", "Requests waiting for a place.", waiting)
        if self._info is None:
            return
        used = 1 - free_blocks / self._info.num_blocks
        yield gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", used)
        config = InfoMetricFamily("fastgpt_cache_config", "The KV cache.")
        config.add_metric(
            [],
            {
                "dtype": self._info.stored_cache_dtype,
                "block_size": str(self._info.block_size),
                "num_blocks": str(self._info.num_blocks),
                "num_tokens": str(self._info.num_cache_tokens),
            },
        )
        yield config
        if self._nvml is not None and (share := self._nvml.utilization()) is not None:
            yield gauge(
                "gpu_utilization", "Share of the time a kernel was resident (NVML), 0 to 1.", share
            )


class _Live:
    """A collector that asks at scrape time."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.live()


class _Nvml:
    """NVIDIA's management library for one GPU; says once why it does not work."""

    def __init__(self, index: int) -> None:
        self._handle: Any = None
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self._nvml = pynvml
        except Exception as error:
            _logger.warning("fastgpt_gpu_utilization is not available: %s", error)

    def utilization(self) -> float | None:
        if self._handle is None:
            return None
        try:
            return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100.0
        except self._nvml.NVMLError:
            return None
