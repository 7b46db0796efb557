"""``tacit bench secure-sum`` as a user runs it; no test here looks at a time."""

import json

import pytest
from typer.testing import CliRunner

from tacit.bench.secure_sum import measure_secure_sum
from tacit.cli.main import app
from tacit.errors import InputError


@pytest.mark.parametrize("server", ["--lying", "--curious"])
def test_it_prints_consistent_figures(server: str) -> None:
    arguments = ["--protocol", "masked", "--clients", "12", "--params", "3000", "--dropout", "0.2", server, "--json"]
    run = CliRunner().invoke(app, ["bench", "secure-sum", *arguments], catch_exceptions=False)
    assert run.exit_code == 0
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    assert (figures["clients"], figures["params"], figures["dropped"], figures["holders"]) == (12, 3000, 2, 11)
    assert figures["exact"]
    assert figures["recovered"]
    assert figures["ring_bits"] == 16 + 4
    assert 2.5 <= figures["upload_bytes_per_param"] <= 2.5 + 2500 / 3000
    assert figures["client_max_cpu_s"] >= figures["client_cpu_s"] > 0
    assert figures["server_cpu_s"] > 0
    assert figures["download_bytes_per_client"] > 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": "plain"}, "choose one of masked"),
        ({"params": 0}, "at least 1"),
        ({"dropout": 0.5}, "a fraction"),
        ({"clients": 2}, "cohort of 2"),
    ],
)
def test_mistakes_are_refused(change: dict, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        measure_secure_sum(**{"protocol": "masked", "clients": 10, "params": 5, "dropout": 0.0, **change})
