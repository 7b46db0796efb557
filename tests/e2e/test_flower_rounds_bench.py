"""benchmarks/peers/flower_rounds.py as a user runs it, small; no test here looks at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers" / "flower_rounds.py"
KINDS = ["flower", "flower-brisk", "tacit", "tacit-masked"]
PATIENCE = 900.0


@pytest.mark.slow
def test_it_prints_figures_of_each_kind_and_ends_by_itself(tmp_path: Path) -> None:
    own = {name: value for name, value in os.environ.items() if name != "TACIT_DATA"}
    command = [sys.executable, str(SCRIPT), "--nodes", "3", "--rounds", "2", "--examples", "50", "--kinds", *KINDS]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path / "bench")], capture_output=True, text=True, env=own, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    figures, ratios = lines[:-1], lines[-1]
    assert [one["kind"] for one in figures] == KINDS
    assert ratios.keys() == {f"tacit-masked ÷ {kind}" for kind in KINDS}
    model = 199_210
    for one in figures:
        assert (one["nodes"], one["rounds"], one["data"]) == (3, 2, "noise, 50 examples a node")
        assert 0 < one["min_s"] <= one["median_s"] <= one["max_s"]
        # The model goes to each node, and a vector of as many entries comes back.
        assert one["bytes_down"] > 3 * 4 * model
        assert one["bytes_up"] > 3 * (2 if one["kind"] == "tacit-masked" else 4) * model
        assert 0 <= one["accuracy"] <= 1
