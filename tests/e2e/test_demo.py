"""`tacit demo` as a user runs it: in a process of its own."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

KEYS = {
    "dataset",
    "rounds",
    "federated_accuracy",
    "encrypted_accuracy",
    "agreement",
    "test_images",
    "rounds_per_batch",
    "bytes_online_per_image",
    "bytes_dealt_per_image",
    "max_abs_error",
    "seconds_federated",
    "seconds_encrypted",
}


def tacit(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "tacit"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_demo_prints_one_json_object_and_writes_a_report(tmp_path):
    path = tmp_path / "report.html"
    done = tacit("demo", "--rounds", "3", "--report", str(path), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == KEYS
    assert figures["dataset"] == "digits"
    assert figures["rounds"] == 3
    assert figures["test_images"] == 360
    assert figures["federated_accuracy"] > 0.7
    assert figures["agreement"] >= 0.995
    assert abs(figures["encrypted_accuracy"] - figures["federated_accuracy"]) <= 0.005
    assert 0 < figures["max_abs_error"] < 5e-3
    assert figures["rounds_per_batch"] == 9
    page = path.read_text()
    assert page.lower().startswith("<!doctype html>")
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert str(path) in done.stderr.replace("\n", "")


def test_the_same_seed_gives_the_same_federated_model():
    runs = [json.loads(tacit("demo", "--rounds", "2", "--split", "shards", "--json").stdout) for _ in range(2)]
    assert runs[0]["federated_accuracy"] == runs[1]["federated_accuracy"]
    assert runs[0]["bytes_online_per_image"] == runs[1]["bytes_online_per_image"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cohort", "11"], "cohort"),
        (["--rounds", "-1"], "rounds"),
        (["--clients", "0"], "clients"),
        (["--lr", "-0.1"], "lr"),
        (["--dataset", "letters"], "letters"),
        (["--model", "resnet"], "resnet"),
        (["--split", "random"], "random"),
        (["--dataset", "mnist", "--data-dir", "/nonexistent"], "/nonexistent"),
        (["--report", "/nonexistent/report.html"], "/nonexistent"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(arguments, named):
    done = tacit("demo", *arguments, TACIT_DATA="")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert named in lines[0]


def test_a_damaged_data_file_is_named(tmp_path):
    for split, kind in itertools.product(("train", "t10k"), ("images-idx3", "labels-idx1")):
        (tmp_path / f"{split}-{kind}-ubyte.gz").write_bytes(b"\x1f\x8b not a gzip file")
    done = tacit("demo", "--dataset", "mnist", "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "train-images-idx3-ubyte.gz" in done.stderr


@pytest.mark.slow
def test_mnist_reaches_its_accuracy_and_loses_none_of_it_encrypted():
    if not os.environ.get("TACIT_DATA"):
        pytest.skip("MNIST is not here: set TACIT_DATA to the folder that holds mnist/")
    figures = json.loads(tacit("demo", "--dataset", "mnist", "--json").stdout.splitlines()[-1])
    assert figures["test_images"] == 10_000
    assert figures["federated_accuracy"] >= 0.97
    assert abs(figures["encrypted_accuracy"] - figures["federated_accuracy"]) <= 0.001
    assert figures["agreement"] >= 0.999
