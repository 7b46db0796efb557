"""``tacit bench`` as a user runs it; no test here looks at a time."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from tacit import cluster
from tacit.bench import nets
from tacit.cli.main import app, main
from tacit.errors import InputError

KEYS = {
    "net",
    "batch",
    "online_s",
    "online_min_s",
    "deal_s",
    "model_load_s",
    "bytes_online_per_party",
    "bytes_dealt",
    "rounds",
    "max_abs_error",
    "plaintext_s",
    "plaintext_cold_s",
    "online_over_plaintext",
    "deal_over_plaintext",
    "peak_rss_mb",
    "threads",
    "versions",
}


def test_bench_inference_prints_consistent_figures() -> None:
    run = CliRunner().invoke(
        app, ["bench", "inference", "--net", "mlp", "--batch", "2", "--repeat", "2", "--json"], catch_exceptions=False
    )
    assert run.exit_code == 0
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    assert set(figures) == KEYS | {"profile"}
    assert (figures["net"], figures["batch"], figures["threads"]) == ("mlp", 2, 1)
    # Three products' openings of 784 + 128 + 128 words; two ReLUs of 128: a word, a byte and a bit an element.
    assert figures["rounds"] == 9
    assert figures["bytes_online_per_party"] == 2 * (8 * (784 + 128 + 128) + 2 * (9 * 128 + 128 // 8))
    # A unit of truncation in 128 activations, times weights below 1/sqrt(128), twice.
    assert figures["max_abs_error"] < 128 * 2.0**-16
    assert figures["online_min_s"] <= figures["online_s"]
    assert figures["online_over_plaintext"] == pytest.approx(figures["online_s"] / figures["plaintext_s"])
    assert set(figures["versions"]) >= {"python", "torch"}


TRAINING_KEYS = {
    "net",
    "batch",
    "steps",
    "step_s",
    "step_min_s",
    "deal_s",
    "plaintext_step_s",
    "step_over_plaintext",
    "deal_over_plaintext",
    "bytes_online_per_party",
    "bytes_dealt",
    "rounds",
    "max_abs_error_weights",
    "peak_rss_mb",
    "threads",
    "versions",
}


def test_bench_training_prints_consistent_figures() -> None:
    run = CliRunner().invoke(
        app, ["bench", "training", "--net", "mlp", "--batch", "2", "--steps", "2", "--json"], catch_exceptions=False
    )
    assert run.exit_code == 0
    figures = json.loads(run.stdout.strip().splitlines()[-1])
    assert set(figures) == TRAINING_KEYS | {"profile"}
    assert [figures[key] for key in ("net", "batch", "steps", "threads")] == ["mlp", 2, 2, 1]
    # What the same step costs in one process, planned there by the trainer that runs it.
    with cluster() as parties:
        cost = parties.trainer(nets.build("mlp")[0]).cost((2, 784))
    counted = [figures[key] for key in ("rounds", "bytes_online_per_party", "bytes_dealt")]
    assert counted == [cost.rounds, cost.bytes_online, cost.bytes_dealt]
    # Units of 2^-16 in 128 activations and gradients, at a rate of 0.1 over three steps.
    assert figures["max_abs_error_weights"] < 128 * 2.0**-16
    assert figures["step_min_s"] <= figures["step_s"]
    assert figures["step_over_plaintext"] == pytest.approx(figures["step_s"] / figures["plaintext_step_s"])
    assert figures["profile"]["layers"]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("inference", ["--net", "alexnet"]),
        ("inference", ["--batch", "0"]),
        ("inference", ["--repeat", "0"]),
        ("training", ["--net", "resnet18"]),
        ("training", ["--batch", "0"]),
        ("training", ["--steps", "0"]),
    ],
)
def test_mistakes_are_one_line(
    command: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tacit", "bench", command, *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error:")


@pytest.mark.parametrize("name", nets.NETS)
def test_networks_are_reproducible_and_give_ten_logits(name: str) -> None:
    (model, shape), (again, _) = nets.build(name), nets.build(name)
    assert not model.training
    with torch.inference_mode():
        one, other = (net(torch.ones(2, *shape)) for net in (model, again))
    assert one.shape == (2, 10)
    assert torch.equal(one, other)


def test_unknown_network() -> None:
    with pytest.raises(InputError, match="choose one of mlp, lenet"):
        nets.build("alexnet")


def test_parameter_counts() -> None:
    counts = {name: sum(p.numel() for p in nets.build(name)[0].parameters()) for name in ("mlp", "lenet", "resnet18")}
    assert counts == {"mlp": 118_282, "lenet": 431_080, "resnet18": 11_173_962}
