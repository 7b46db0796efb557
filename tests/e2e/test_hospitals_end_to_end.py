"""`tacit hospitals`, as a user runs it: SuperLink, four hospitals, two models, a report."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif("TACIT_DATA" not in os.environ, reason="the hospitals' files are not here: set TACIT_DATA")
def test_hospitals_train_over_flower_and_nobody_is_lost(tmp_path):
    report = tmp_path / "hospitals.html"
    arguments = ["hospitals", "--rounds", "3", "--json", "--report", str(report), "--folder", str(tmp_path / "all")]
    code = "from tacit.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for model in ("logistic", "mlp"):
        trained = found["models"][model]
        assert (trained["rounds"], trained["lost"]) == (3, 0)
        ours, simulated = (
            trained["ways"][way] for way in ("hospitals over Flower, private", "the same in one process")
        )
        assert abs(ours["pooled"] - simulated["pooled"]) < 0.2
    assert found["models"]["mlp"]["ways"]["hospitals over Flower, private"]["epsilon"] < 20
    assert "8 diagnoses are those of the model in the clear" in found["handed_over"]
    assert "FLamby" in report.read_text()
    journal = (tmp_path / "all" / "cleveland.state" / "journal.txt").read_text()
    assert "in a secure sum of 4 sites" in journal
    assert "in the clear" not in journal
