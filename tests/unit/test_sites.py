"""A site: its file, what it agrees to, its own privacy account, its journal, its preview."""

import json
import re
from contextlib import closing
from datetime import datetime
from pathlib import Path

import pytest
import torch
from test_flower_rounds import CLEAR, MASKED, OPEN, SECRET, over_sites
from typer.testing import CliRunner

from sites import answering, grid_of, open_site, tables, write_files
from tacit.cli.main import app
from tacit.errors import DataError, InputError
from tacit.federated.eligibility import DeviceStatus
from tacit.identity import Identity
from tacit.runs.seat import Wait
from tacit.runtimes.flower.federation_file import FederationFile, entry, node_key
from tacit.sites import policy
from tacit.sites.config import Allow, CsvData, IdxData, NumpyData, OwnData, SiteFile
from tacit.sites.memory import SiteMemory

PRIVATE = MASKED + '[privacy]\nlevel = "record"\nclip = 1.0\nnoise_multiplier = 1.1\ndelta = 1e-3\n'


def refusals(tmp_path, text: str, allow: str) -> set[str]:
    """Why four sites that allow so much do not train in such a run."""
    files = write_files(tmp_path, tables(4), allow)
    with answering(files, 4) as sites:
        record = over_sites(files, grid_of(sites), text).advance()
    return set(record.lost.values())


@pytest.mark.parametrize(
    ("text", "allow", "reason"),
    [
        (MASKED, 'models = ["mlp"]\nprivacy = "none"\n', "its model 'logistic' is not among those allowed here: mlp"),
        (MASKED, "", "records must be protected by privacy of kind 'record' here, and the run has 'none'"),
        (CLEAR, 'privacy = "none"\n', "it has no secure sum: the coordinator would see this site's own update"),
        (MASKED, SECRET + "minimum = 4\n", "the round may end with 3 vectors, this client wants 4"),
        (MASKED, SECRET + "rounds = 10\n", "it has 20 rounds, and at most 10 are allowed here"),
        (MASKED, SECRET + "epsilon = 1.0\n", "keeps a privacy budget for its records"),
        (PRIVATE.replace("classes = 2", "classes = 2\nstandardise = true"), "", "it adds up features without noise"),
        (PRIVATE + "noise_seed = 1\n", "", "its noise comes from a seed that others know"),
        (MASKED.replace("most_examples = 50", "most_examples = 20"), SECRET, "this site has more than 20 examples"),
        (MASKED.replace("shape = [4]", "shape = [5]"), SECRET, r"examples of shape \(4,\) here, expected \(5,\)"),
    ],
)
def test_a_site_says_why_it_does_not_take_part(tmp_path, text, allow, reason):
    found = refusals(tmp_path, text, allow)
    assert found
    for said in found:
        with pytest.raises(InputError, match=reason):
            raise InputError(said)


def test_records_enter_sums_without_noise_only_where_the_site_says_so(tmp_path):
    text = PRIVATE.replace("classes = 2", "classes = 2\nstandardise = true")
    files = write_files(tmp_path, tables(4), 'unnoised = ["features"]\n', training=0.7)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid_of(sites), text)
        assert federation.standardise(4).keys() == {"mean", "std"}
        assert federation.advance().cohort == (0, 1, 2, 3)
        assert federation.evaluate(None) == (None, None)
        assert set(federation.sites.asking.lost.values()) == {
            "refused: how the model does on this site's records is not added up without noise"
        }


def test_hours_are_the_simulators_policy_and_refuse_with_a_reason(tmp_path, monkeypatch):
    files = write_files(tmp_path, tables(4), SECRET + "hours = [20, 21]\n")
    status = DeviceStatus(idle=True, charging=True, unmetered=True, hour=12.0)
    monkeypatch.setattr(policy, "status_now", lambda: status)
    with answering(files, 4) as sites:
        federation = over_sites(files, grid_of(sites), MASKED)
        record = federation.advance()
        assert set(record.lost.values()) == {"refused: not now: outside the hours 20 to 21"}
        monkeypatch.setattr(policy, "status_now", lambda: DeviceStatus(True, True, True, 20.5))
        assert federation.advance().cohort == (0, 1, 2, 3)
    notes = federation.sites.asking.board.notes
    assert any("would not take part now: outside the hours 20 to 21" in note for note in notes)


def test_the_status_of_this_machine_can_be_told():
    status = policy.status_now()
    now = datetime.now()
    assert abs(status.hour - now.hour - now.minute / 60) < 1
    assert 0 <= status.battery <= 1


def test_a_site_pays_for_its_records_from_its_own_budget_and_stops_there(tmp_path):
    files = write_files(tmp_path, tables(4), "epsilon = 8.0\ndelta = 1e-3\n")
    with answering(files, 4) as sites:
        federation = over_sites(files, grid_of(sites), PRIVATE)
        first = federation.advance()
        assert first.cohort == (0, 1, 2, 3)
        assert 0 < first.epsilon < 8
        for _ in range(15):
            record = federation.advance()
            if record.lost:
                break
        assert set(record.lost.values()) == {"refused: its privacy budget is spent"}
        assert record.epsilon is None or record.epsilon <= 8
    with closing(open_site(files, 0)) as again:
        assert again._ledger.epsilon("client 0", 1e-3) <= 8
    journals = [tmp_path / f"state{index}" / "journal.txt" for index in range(4)]
    lines = [line for journal in journals for line in journal.read_text().splitlines()]
    assert any("sent" in line and "of its records' privacy is spent" in line for line in lines)
    assert any("refused" in line and "its privacy budget is spent" in line for line in lines)
    assert all(journal.stat().st_mode & 0o077 == 0 for journal in journals)


def test_what_a_site_discloses_is_its_own_choice(tmp_path):
    files = write_files(tmp_path, tables(4), 'disclose = ["examples"]\n')
    with answering(files, 4) as sites:
        federation = over_sites(files, grid_of(sites), PRIVATE)
        record = federation.advance()
    assert record.epsilon is None
    told = federation.sites.asking.disclosed
    assert told == {0: {"examples": 30}, 1: {"examples": 40}, 2: {"examples": 20}, 3: {"examples": 50}}


def test_a_sites_own_errors_stay_there(tmp_path, monkeypatch, capsys):
    files = write_files(tmp_path, tables(4), OPEN)

    def fail(*arguments: object) -> None:
        raise RuntimeError("patient 17 has a secret")

    with answering(files, 4) as sites:
        monkeypatch.setattr("tacit.sites.site.Study.train", fail)
        record = over_sites(files, grid_of(sites)).advance()
    assert set(record.lost.values()) == {"refused: an error of type RuntimeError, see the site's own log"}
    assert "patient" not in (tmp_path / "state0" / "journal.txt").read_text()
    assert "patient 17" in capsys.readouterr().err


def test_damaged_data_keeps_a_site_from_joining_and_is_in_the_journal(tmp_path):
    files = write_files(tmp_path, tables(1), OPEN)
    (tmp_path / "inputs0.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="cannot be read as a NumPy array"):
        open_site(files, 0)
    assert "the site's data cannot be used" in (tmp_path / "state0" / "journal.txt").read_text()


def test_what_is_kept_of_a_round_is_found_again_if_the_round_counted(tmp_path):
    memory, run = SiteMemory(tmp_path / "state"), b"r" * 32
    for number in (1, 2, 3):
        memory.keep(run, number, {"control": torch.full((2,), float(number))})
    assert memory.recall(run, 2)["control"].tolist() == [2, 2]
    assert memory.recall(run, 1) == {}
    assert memory.recall(run, 3)["control"].tolist() == [3, 3]
    assert memory.recall(b"s" * 32, 3) == {}
    assert memory.recall(run, 0) == {}


def test_a_loader_of_the_sites_own(tmp_path):
    files = write_files(tmp_path, tables(1), OPEN)
    (tmp_path / "loading.py").write_text(
        "import torch\nfrom tacit.data.examples import Examples\n"
        "def load(folder):\n    return Examples(torch.zeros(5, 4), torch.tensor([0, 1, 0, 1, 0]))\n"
        "def nothing(folder):\n    return [1]\n"
    )
    text = files.site(0).read_text()
    data = text[text.index("[data]") : text.index("[allow]")]
    files.site(0).write_text(text.replace(data, '[data]\nformat = "own"\nloader = "loading.py:load"\ntraining = 0.6\n'))
    train, kept = SiteFile.read(files.site(0)).examples()
    assert (len(train), len(kept)) == (3, 2)
    for loader, complaint in (("loading.py:nothing", "gives a list"), ("none.py:load", "not a Python file")):
        files.site(0).write_text(text.replace(data, f'[data]\nformat = "own"\nloader = "{loader}"\n'))
        with pytest.raises(InputError, match=complaint):
            SiteFile.read(files.site(0)).examples()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('format = "numpy"', 'format = "excel"'), "excel"),
        (("[allow]", "[allow]\nminimum = 2"), "a sum of fewer than 3"),
        (("[allow]", "[allow]\nhours = [1, 1]"), "two different local hours"),
        (("training = 1.0", "training = 0.0"), "train on a fraction above 0"),
        (("[allow]", "[allow]\nsecret = 1"), "unknown field `secret`"),
    ],
)
def test_a_site_file_says_no_nonsense(tmp_path, change, complaint):
    files = write_files(tmp_path, tables(1), OPEN)
    files.site(0).write_text(files.site(0).read_text().replace(*change))
    with pytest.raises(InputError, match=complaint):
        SiteFile.read(files.site(0))


def test_federation_toml_names_everybody_once(tmp_path):
    files = write_files(tmp_path, tables(2), OPEN)
    federation, text = files.federation, (tmp_path / "federation.toml").read_text()
    assert [site.name for site in federation.sites] == ["site0", "site1"]
    assert federation.coordinator == files.coordinator.public
    for bad, complaint in (
        (text + entry("site0", Identity.fresh()), "the name site0 stands there twice"),
        (text + entry("other", files.sites[0]), "stands there twice"),
        (text.replace("localhost:1", "localhost"), "give host:port"),
        (text.replace("ecdsa-sha2", "rsa-sha2"), "no ECDSA key"),
        (text.replace("site1", "site 1"), "is no name"),
    ):
        with pytest.raises(InputError, match=complaint):
            FederationFile.parse(bad, tmp_path / "federation.toml")


def test_a_nodes_key_follows_from_the_sites():
    identity = Identity(b"7" * 32)
    assert node_key(identity).private_numbers() == node_key(identity).private_numbers()
    assert node_key(identity).private_numbers() != node_key(Identity(b"8" * 32)).private_numbers()


def test_the_preview_says_what_a_run_would_compute_send_and_cost(tmp_path):
    files = write_files(tmp_path, tables(4), "epsilon = 30.0\ndelta = 1e-3\n", training=0.5)
    (tmp_path / "run.toml").write_text(PRIVATE)
    arguments = ["site", "join", "--config", str(files.site(0)), "--preview", str(tmp_path / "run.toml")]
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert shown["refused"] == "no: this site would take part"
    assert shown["data"] == "15 examples to train on, 15 kept back to try models on"
    assert "logistic, 10 parameters" in shown["trains"]
    assert "a masked vector of 16 numbers of 18 bits" in shown["sends"]
    assert "sums of at least 3 sites only" in shown["sends"]
    assert "of this site's budget of 30" in shown["privacy"]
    (tmp_path / "run.toml").write_text(MASKED)
    shown = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert "records must be protected" in shown["refused"]
    assert "privacy" in CliRunner().invoke(app, arguments).stdout
    assert not (tmp_path / "state0" / "journal.txt").exists()


def test_a_site_shows_its_entry_of_federation_toml(tmp_path):
    identity = Identity.fresh()
    identity.save(tmp_path / "cleveland.key")
    result = CliRunner().invoke(app, ["site", "show", str(tmp_path / "cleveland.key")])
    assert result.stdout == entry("cleveland", identity)


def test_every_key_of_a_sites_and_a_coordinators_file_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "deploy" / "federation.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))
    for kind in (Allow, CsvData, IdxData, NumpyData, OwnData, Wait):
        assert set(kind.__struct_fields__) <= documented, kind
