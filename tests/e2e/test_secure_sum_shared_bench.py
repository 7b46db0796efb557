"""``tacit bench secure-sum`` of the shared sum as a user runs it; no test here looks at a time."""

import json

import pytest
from typer.testing import CliRunner

from tacit.cli.main import app


@pytest.mark.parametrize("protocol", ["shared", "shared-verified"])
def test_it_prints_consistent_figures(protocol: str) -> None:
    arguments = ["--protocol", protocol, "--clients", "35", "--params", "3000", "--dropout", "0.2", "--json"]
    run = CliRunner().invoke(app, ["bench", "secure-sum", *arguments], catch_exceptions=False)
    assert run.exit_code == 0
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    assert (figures["protocol"], figures["clients"], figures["params"]) == (protocol, 35, 3000)
    assert (figures["dropped"], figures["holders"]) == (7, 0)
    assert figures["exact"]
    assert figures["recovered"]
    assert figures["ring_bits"] == 16 + 6
    assert 22 / 8 <= figures["upload_bytes_per_param"] <= 22 / 8 + 480 / 3000
    assert figures["client_max_cpu_s"] >= figures["client_cpu_s"] > 0
    assert figures["server_cpu_s_per_client"] == pytest.approx(figures["server_cpu_s"] / 28)
