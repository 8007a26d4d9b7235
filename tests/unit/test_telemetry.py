"""The callback `otel`: the trace of a run, from the SDK's exporter in memory and from a real HTTP receiver."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from conftest import MakeConfig

from myllm_ray import train
from myllm_ray.engine.reporting.events import make_event
from myllm_ray.engine.reporting.telemetry import OpenTelemetryCallback

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


class InMemory(OpenTelemetryCallback):
    """Keeps the spans."""

    made: Any = None

    def exporter(self) -> Any:
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        InMemory.made = InMemorySpanExporter()
        return InMemory.made


@contextmanager
def receiver(hangs: bool = False) -> Iterator[tuple[str, list[bytes]]]:
    """Yields the URL of an OTLP receiver on this machine and the list of what it has received."""
    received: list[bytes] = []
    ended = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            if hangs:
                ended.wait(60)
                return
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    finally:
        ended.set()
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_trace_of_a_run(make_config: MakeConfig) -> None:
    common = ("run.max_steps=4", "checkpoint.every_steps=2", "evaluation.every_steps=2")
    train(make_config(*common, callbacks=["jsonl", f"{__name__}:InMemory"]))
    spans = InMemory.made.get_finished_spans()
    names = {span.context.span_id: span.name for span in spans}
    found = [(span.name, names.get(span.parent.span_id) if span.parent else None) for span in spans]
    assert sorted(found) == [
        ("building the model", "preparation"),
        ("checkpoint", "training"),
        ("checkpoint", "training"),
        ("evaluation", "training"),
        ("evaluation", "training"),
        ("preparation", "run"),
        ("preparing data", "preparation"),
        ("run", None),
        ("starting", "preparation"),
        ("training", "preparation"),
        ("training", "run"),
    ]
    run = next(span for span in spans if span.name == "run")
    assert (run.attributes["trainer"], run.attributes["status"], run.attributes["step"]) == ("sft", "done", 4)
    assert all(run.start_time <= span.start_time <= span.end_time <= run.end_time for span in spans)
    evaluation = next(span for span in spans if span.name == "evaluation")
    assert evaluation.attributes["validation_loss"] > 0
    assert evaluation.end_time > evaluation.start_time


def test_restarts_and_failures() -> None:
    callback = InMemory()
    for event in (
        make_event("start", run="r", name="a", folder="/a", trainer="sft", workers=[2, 2], command=[]),
        make_event("train_start", 0, 0, "r", total_steps=10),
        make_event("rank_failed", run="r", reason="worker 1 died", counted=True, failures=1),
        make_event("attempt", 4, None, "r", workers=2, from_step=0, to_step=4, end="failed"),
        make_event("restart", None, None, "r", reason="worker 1 died", restarts=1),
        make_event("train_start", 2, 0, "r", total_steps=10),
        make_event("end", 5, None, "r", status="failed", reason="no more", checkpoint=None),
    ):
        callback.on_event(event)
    callback.close()
    spans = InMemory.made.get_finished_spans()
    assert [span.name for span in spans] == ["preparation", "training", "restart", "training", "run"]
    run = spans[-1]
    assert [event.name for event in run.events] == ["rank_failed", "restart"]
    assert (run.status.status_code.name, run.status.description) == ("ERROR", "no more")


def test_a_real_receiver_gets_the_spans(make_config: MakeConfig) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    with receiver() as (url, received):
        train(make_config("run.max_steps=2", callbacks=["jsonl", {"otel": {"endpoint": url, "service_name": "here"}}]))
    names, services = set(), set()
    for body in received:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            names |= {span.name for scope in resource.scope_spans for span in scope.spans}
    assert services == {"here"}
    assert {"run", "preparation", "training", "checkpoint", "evaluation"} <= names


def test_a_receiver_that_hangs_or_is_gone_does_not_stop_the_run(make_config: MakeConfig, warned: list[str]) -> None:
    with receiver(hangs=True) as (url, received):
        options = {"endpoint": url, "timeout_seconds": 0.5}
        assert train(make_config("run.max_steps=2", "run.name=hangs", callbacks=[{"otel": options}])).step == 2
        started = time.monotonic()
        assert received
    # The server is closed now: the port refuses connections.
    assert train(make_config("run.max_steps=2", "run.name=gone", callbacks=[{"otel": options}])).step == 2
    assert time.monotonic() - started < 60
    assert sum("otel: spans can't be sent" in text for text in warned) <= 2
