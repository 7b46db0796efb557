"""What the hospitals' run is made of, short of running it."""

import os
from html.parser import HTMLParser

import pytest
import torch

from tacit.data.heart_disease import load_heart_disease
from tacit.federated.history import RoundRecord
from tacit.report.hospitals import HospitalsReport, Scores, Trained, render, write
from tacit.runs import config
from tacit.sites.config import SiteFile
from tacit.sites.hospitals import MODELS, NAMES, PUBLISHED, Setting, write_federation

needs_data = pytest.mark.skipif(
    "TACIT_DATA" not in os.environ, reason="the hospitals' files are not here: set TACIT_DATA"
)


@needs_data
def test_each_hospitals_own_file_gives_the_simulators_examples(tmp_path):
    federation = write_federation(tmp_path / "all", None, Setting())
    for name, hospital in zip(NAMES, load_heart_disease(), strict=True):
        train, kept = SiteFile.read(federation.folder / f"{name}.toml").examples()
        assert torch.equal(train.inputs, hospital.train.inputs)
        assert torch.equal(train.targets, hospital.train.targets)
        assert torch.equal(kept.inputs, hospital.test.inputs)
    assert (federation.folder / "superlink.secret").stat().st_mode & 0o077 == 0
    assert (federation.folder / "superlink.pem.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("model", MODELS)
def test_over_flower_the_configuration_is_the_simulators_one_key_apart(model):
    lines = [Setting().text(model, runtime).splitlines() for runtime in ("flower", "simulation")]
    assert [pair for pair in zip(*lines, strict=True) if pair[0] != pair[1]] == [
        ('runtime = "flower"', 'runtime = "simulation"')
    ]
    assert config.parse("\n".join(lines[0])).privacy.noise_multiplier == 2.0
    assert config.parse(Setting().text(model, "flower", private=False)).privacy is None


def test_the_report_shows_every_way_and_its_sources(tmp_path):
    record = RoundRecord(1, (0, 1, 2), 10, None, 0.5, 100, 100, 1.0, train_loss=0.1, lost={3: "refused: not now"})
    scores = Scores("hospitals <over> Flower", (0.8, 0.7, 0.6, 0.5), (0.9, None, 0.8, 0.7), 0.75, 6.2)
    trained = Trained("logistic", (scores, *PUBLISHED), (record,), 12.0)
    report = HospitalsReport(
        ("Cleveland", "Hungary", "Switzerland", "Long Beach"),
        (trained,),
        ("2026-01-01 12:00:00  agreed <b>",),
        "handed over to alice and bob",
        60.0,
        {"rounds": "1"},
        {"tacit": "0"},
    )
    page = render(report)
    HTMLParser().feed(page)
    assert "<b>" not in page
    assert "80.0% (0.90)" in page
    assert "no ε counts them" in page
    assert "70.0%</td>" in page
    assert "hospitals &lt;over&gt; Flower" in page
    assert page.count("heart_seed42.csv") == 1
    assert "handed over to alice and bob" in page
    write(report, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == page
