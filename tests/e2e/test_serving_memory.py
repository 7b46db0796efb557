"""The service under load for a minute: no process's memory grows, nothing fails, and the bench says so in JSON."""

import json

import pytest
from typer.testing import CliRunner

from tacit.cli.main import app

SECONDS, CLIENTS = 60, 16
KEYS = {"net", "batch_sizes", "workers", "alone", "levels", "refill_rows_per_s", "pool_bytes", "versions"}
LEVEL_KEYS = {
    "clients", "requests_per_s", "p50_ms", "p99_ms", "batch_mean", "errors", "wrong", "cpu_ms", "dealt_s", "memory_mb",
}  # fmt: skip
PROCESSES = {"alice", "bob", "provider", "alice's worker 0", "bob's worker 0"}
BYTES_A_REQUEST = 250
"""What a process may keep of a request at most. The least that anything kept by mistake takes, an entry of a dict with
its key, is about as much; the shares of one input to this model take 6,272 bytes."""
NOISE_MB = 7.0
"""The parties' allocator takes huge pages of 2 MiB (`tacit.party.children`): two that come in the middle of the half,
as when a thread's heap is a little larger than ever before, make a slope of 6.3 MB."""


@pytest.mark.slow
def test_memory_does_not_grow_with_requests() -> None:
    command = f"bench serving --net mlp --clients {CLIENTS} --seconds {SECONDS} --batch-sizes 1,8 --disk-gb 0.1 --json"
    run = CliRunner().invoke(app, command.split(), catch_exceptions=False)
    assert run.exit_code == 0
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    assert set(figures) == KEYS
    (level,) = figures["levels"]
    assert set(level) == LEVEL_KEYS
    assert level["clients"] == CLIENTS
    assert level["errors"] == {}
    assert level["wrong"] == 0
    assert set(level["memory_mb"]) == PROCESSES
    minutes, requests = SECONDS / 2 / 60, level["requests_per_s"] * SECONDS / 2
    for name, memory in level["memory_mb"].items():
        grown = memory["slope"] * minutes
        assert grown < NOISE_MB + requests * BYTES_A_REQUEST / 1e6, (name, memory)
