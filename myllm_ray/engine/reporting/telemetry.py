"""The callback `otel`: the run as an OpenTelemetry trace, sent over OTLP/HTTP in the background.

run                          from the start of the process to its end; warnings and restarts are its span events
├── preparation              to the first step
│   └── preparing data, ...  one span per phase
└── training                 one span per worker group
    ├── evaluation
    └── checkpoint
"""

from __future__ import annotations

import json
import logging
import threading
from typing import Any

from pydantic import Field, PositiveFloat

from myllm_ray.common.extras import require
from myllm_ray.config.sections import Section
from myllm_ray.engine.callbacks import Callback
from myllm_ray.engine.reporting.events import Event, seconds_of

log = logging.getLogger(__name__)
_ON_SPAN = ("warning", "intervention", "rank_failed", "rank_hung", "restart", "amendment", "request", "epoch")
"""Events that become span events of the run."""
_LIBRARY = "opentelemetry.exporter"


class OpenTelemetryCallback(Callback):
    """Sends the run as a trace. It sends nothing for single steps, and a receiver that fails does not stop the run.

    Spans are queued and sent by a thread of the OpenTelemetry SDK. If the receiver does not answer, they are dropped,
    with one warning. At the end of the run, the rest is sent for at most `timeout_seconds`.
    """

    class Config(Section):
        """Settings of the OpenTelemetry export. Headers, such as a token, come from OTEL_EXPORTER_OTLP_HEADERS."""

        endpoint: str | None = Field(
            None,
            description="URL of the receiver for traces, http://host:4318/v1/traces; default: from the environment "
            "variables of OpenTelemetry (OTEL_EXPORTER_OTLP_ENDPOINT)",
        )
        timeout_seconds: PositiveFloat = Field(
            5.0, description="longest wait for the receiver, per request and at the end"
        )
        service_name: str = "myllm_ray"

    config: Config
    main_only = True
    on_driver = True

    def __init__(self, config: Config | None = None, **options: Any):
        super().__init__(config, **options)
        self._provider: Any = None
        self._tracer: Any = None
        self._api: Any = None
        self._spans: dict[str, Any] = {}
        """Open spans by their level: run, stage (preparation or training), phase."""
        self._reported = _Reported()
        # Here, so that a missing library is reported before the run starts.
        require("opentelemetry.exporter.otlp.proto.http", "myllm_ray[otel]", "callback otel")

    def exporter(self) -> Any:
        """Returns the exporter; a subclass may use another one."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=self.config.endpoint, timeout=self.config.timeout_seconds)

    def on_event(self, event: Event) -> None:
        name, now = event["event"], int(seconds_of(event) * 1e9)
        if name == "start":
            self._open(event)
            self._begin("run", "run", now, {k: event[k] for k in ("name", "folder", "trainer")})
            self._begin("stage", "preparation", now)
        if "run" not in self._spans:
            return
        if name == "phase" and self._spans.get("training") is None:
            self._end("phase", now)
            self._begin("phase", event["phase"], now)
        elif name == "train_start":
            self._end("phase", now)
            self._end("stage", now)
            self._begin("training", "training", now, {"from_step": event["step"], "total_steps": event["total_steps"]})
        elif name in ("evaluation", "checkpoint"):
            fields = event.get("metrics") or {"folder": event.get("folder")}
            self._done(name, now, event.get("seconds"), {"step": event["step"], **fields})
        elif name in _ON_SPAN:
            self._spans["run"].add_event(name, _attributes(event), now)
        if name in ("attempt", "restart", "amendment", "end"):
            self._end("training", now)
        if name in ("restart", "amendment"):
            self._begin("stage", name, now, {"reason": event["reason"]})
        if name == "end":
            self._finish(event, now)

    def _open(self, event: Event) -> None:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        logging.getLogger(_LIBRARY).addHandler(self._reported)
        logging.getLogger(_LIBRARY).propagate = False
        self._api = trace
        resource = Resource.create({"service.name": self.config.service_name, "myllm_ray.run": str(event["run"])})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        processor = BatchSpanProcessor(self.exporter(), export_timeout_millis=self.config.timeout_seconds * 1000)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("myllm_ray")

    def _parent(self, level: str) -> Any:
        above = {"run": (), "stage": ("run",), "training": ("run",), "phase": ("stage", "run")}
        found = next(
            (self._spans[name] for name in above.get(level, ("training", "stage", "run")) if name in self._spans), None
        )
        return None if found is None else self._api.set_span_in_context(found)

    def _begin(self, level: str, name: str, now: int, attributes: dict[str, Any] | None = None) -> None:
        self._end(level, now)
        self._spans[level] = self._tracer.start_span(
            name, self._parent(level), attributes=_attributes(attributes or {}), start_time=now
        )

    def _end(self, level: str, now: int) -> None:
        span = self._spans.pop(level, None)
        if span is not None:
            span.end(now)

    def _done(self, name: str, now: int, seconds: float | None, attributes: dict[str, Any]) -> None:
        """Adds a span that has ended already."""
        start = now - int(1e9 * (seconds or 0.0))
        span = self._tracer.start_span(name, self._parent(name), attributes=_attributes(attributes), start_time=start)
        span.end(now)

    def _finish(self, event: Event, now: int) -> None:
        for level in ("phase", "stage"):
            self._end(level, now)
        run = self._spans["run"]
        run.set_attributes(_attributes({k: event[k] for k in ("status", "reason", "step")}))
        if event["status"] == "failed":
            run.set_status(self._api.StatusCode.ERROR, str(event["reason"]))
        self._end("run", now)

    def close(self) -> None:
        if self._provider is None:
            return
        # In a thread: the shutdown sends what is queued, and a receiver that hangs would delay the end of the command.
        sender = threading.Thread(target=self._provider.shutdown, name="otel", daemon=True)
        sender.start()
        sender.join(self.config.timeout_seconds)
        logging.getLogger(_LIBRARY).removeHandler(self._reported)
        logging.getLogger(_LIBRARY).propagate = True
        self._provider = None


class _Reported(logging.Handler):
    """Logs the first failure of the exporter, which would otherwise log one message per attempt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._said:
            self._said = True
            log.warning("otel: spans can't be sent, further failures are not reported: %s", record.getMessage()[:300])


def _attributes(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns fields as attributes, which are texts and numbers only."""
    return {
        key: value if isinstance(value, (str, bool, int, float)) else json.dumps(value)
        for key, value in fields.items()
        if value is not None and key not in ("version", "time", "event", "run")
    }
