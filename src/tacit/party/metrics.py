"""What a party counts and measures, for Prometheus: names, counts and times, nothing that was computed on."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from tacit.party.jobs.calls import Stepped
from tacit.party.jobs.states import State
from tacit.party.worker_calls import Ran

_STEP_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 100.0)
_SECONDS = (0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
M = TypeVar("M", Counter, Histogram)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._labelled: dict[tuple[object, ...], Any] = {}
        ProcessCollector(registry=registry)
        self.ready = Gauge("tacit_ready", "1 if requests can be served", registry=registry)
        self.sessions = Gauge("tacit_sessions", "Open sessions", ["purpose"], registry=registry)
        self.turned_away = Counter(
            "tacit_connections_turned_away_total", "Callers without a key, or who broke the protocol", registry=registry
        )
        self.requests = Counter(
            "tacit_requests_total", "Requests by how they ended", ["model", "outcome"], registry=registry
        )
        self.request_seconds = Histogram(
            "tacit_request_seconds", "From a request's arrival to its answer", ["model"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batches = Counter("tacit_batches_total", "Batches", ["model", "size", "outcome"], registry=registry)
        self.rows = Counter(
            "tacit_rows_total", "Rows that were asked for, in batches that ran", ["model"], registry=registry
        )
        self.batch_seconds = Histogram(
            "tacit_batch_seconds", "A worker's time for a batch", ["model", "size"], buckets=_SECONDS, registry=registry
        )
        self.waited_seconds = Counter(
            "tacit_batch_waited_seconds_total", "Of that, waiting for the other party's worker", registry=registry
        )
        self.rounds = Counter("tacit_rounds_total", "Messages sent to the other party's workers", registry=registry)
        self.bytes_online = Counter("tacit_bytes_online_total", "Bytes of these", registry=registry)
        self.round_trip = Gauge(
            "tacit_round_trip_seconds",
            "To bob and back, the quickest of the last minute; alice knows",
            registry=registry,
        )
        self.queue = Gauge("tacit_queue_requests", "Requests that wait", registry=registry)
        self.workers = Gauge("tacit_workers_up", "Workers that run", registry=registry)
        self.worker_starts = Counter("tacit_worker_starts_total", "Starts of workers", registry=registry)
        self.pool_tickets = Gauge("tacit_pool_tickets", "Tickets on disk", ["model", "batch"], registry=registry)
        self.ready_tickets = Gauge(
            "tacit_ready_tickets", "Tickets that workers have made ready", ["model", "batch"], registry=registry
        )
        self.pool_bytes = Gauge("tacit_pool_bytes", "What the pool takes of the disk", registry=registry)
        self.burned = Counter("tacit_tickets_burned_total", "Tickets that were taken and not used", registry=registry)
        self.refill = Gauge(
            "tacit_refill_tickets_per_minute", "Tickets that come in a minute", ["model", "batch"], registry=registry
        )
        self.jobs = Gauge("tacit_jobs", "Training jobs on record", ["state"], registry=registry)
        self.set_jobs(())
        self.job_step_seconds = Histogram(
            "tacit_job_step_seconds", "A worker's time for a step of a training job", buckets=_STEP_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.job_waited_seconds = Counter(
            "tacit_job_waited_seconds_total", "Of that, waiting for the other party's worker", registry=registry
        )
        self.job_rounds = Counter(
            "tacit_job_rounds_total", "Messages sent to the other party's worker of a job", registry=registry
        )
        self.job_bytes_online = Counter("tacit_job_bytes_online_total", "Bytes of these", registry=registry)

    def of(self, metric: M, *labels: str | int) -> M:
        """What counts under these labels. (A metric would turn them into text, and look under a lock, each time.)"""
        key = (metric, *labels)
        if key not in self._labelled:
            self._labelled[key] = metric.labels(*labels)
        found: M = self._labelled[key]
        return found

    def ran(self, model: str, size: int, rows: int, ran: Ran) -> None:
        """Count a batch that a worker has run."""
        self.of(self.batches, model, size, "done").inc()
        self.of(self.rows, model).inc(rows)
        self.of(self.batch_seconds, model, size).observe(ran.seconds)
        self.waited_seconds.inc(ran.waited_s)
        self.rounds.inc(ran.rounds)
        self.bytes_online.inc(ran.bytes_online)

    def stepped(self, stepped: Stepped) -> None:
        """Count a step of a training job."""
        self.job_step_seconds.observe(stepped.seconds)
        self.job_waited_seconds.inc(stepped.waited_s)
        self.job_rounds.inc(stepped.rounds)
        self.job_bytes_online.inc(stepped.bytes_online)

    def set_jobs(self, states: Iterable[State]) -> None:
        """Show how many training jobs there are, by what they are doing: a job that is submitted is in the queue."""
        counts = Tally(states)
        for state in State:
            self.jobs.labels(state.value).set(counts[state])

    def set_pool(self, levels: Mapping[tuple[str, int], int], nbytes: int) -> None:
        """Show what the pool holds, by the model's name and the batch size."""
        self.pool_tickets.clear()
        for (model, batch), count in levels.items():
            self.pool_tickets.labels(model, batch).set(count)
        self.pool_bytes.set(nbytes)

    def set_ready(self, counts: Mapping[tuple[str, int], int]) -> None:
        """Show what workers have made ready, by the model's name and the batch size."""
        self.ready_tickets.clear()
        for (model, batch), count in counts.items():
            self.ready_tickets.labels(model, batch).set(count)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
