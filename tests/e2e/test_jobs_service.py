"""Training jobs through three real processes: what owners may do, what strangers may not, and what a kill leaves."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tacit
from jobs_parties import examples, in_the_clear, network
from serving import until
from tacit.cli.main import app
from tacit.errors import InputError, NotPermitted
from tacit.identity import Identity, key_text
from tacit.party import cluster_file
from tacit.party.cluster_file import Owner, Pools
from tacit.party.jobs.client import Jobs
from tacit.party.jobs.states import State
from tacit.party.jobs.submission import Training
from tacit.party.local import CLUSTER, LocalService, prepare

pytestmark = pytest.mark.slow
STEP = 2 * 0.1 * 2.0**-11
OTHERS = ("bank", "stranger")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("jobs")
    cluster = prepare(folder, owner="hospital", clients=("clinic",), pools=Pools(disk_gb=0.2, ahead=8))
    owners = dict(cluster.owners)
    for name in OTHERS:
        identity = Identity.fresh()
        identity.save(folder / f"{name}.key")
        owners[name] = Owner(key=key_text(identity.public))
    (folder / CLUSTER).unlink()
    cluster_file.write(msgspec.structs.replace(cluster, owners=owners), folder / CLUSTER)
    with LocalService(folder) as running:
        running.wait_ready()
        yield running


def jobs_of(service: LocalService, name: str) -> Jobs:
    return Jobs(service.cluster, service.key(name))


def submitted(jobs: Jobs, steps: int, every: int = 2, name: str = "risk", reveal_loss: bool = False) -> str:
    inputs, labels = examples()
    settings = {"steps": steps, "batch_size": 8, "checkpoint_every": every, "reveal_loss": reveal_loss}
    return jobs.submit(Training(network()), inputs, labels, name=name, **settings)  # type: ignore[arg-type]


def as_in_the_clear(jobs: Jobs, digest: str, steps: int) -> None:
    inputs, labels = examples()
    plain = in_the_clear(jobs.describe(digest), Training(network()), inputs, labels, steps)
    found = jobs.result(digest)
    for name, value in plain.state_dict().items():
        assert (found[name] - value).abs().max() < steps * STEP


def facts(service: LocalService, name: str, event: str) -> list[dict[str, object]]:
    lines = (service.folder / f"{name}.log").read_text().splitlines()
    parsed = [json.loads(line) for line in lines if line.startswith("{")]
    return [one for one in parsed if one["event"] == event]


def tickets(service: LocalService, name: str, digest: str) -> list[object]:
    return [one["ticket"] for one in facts(service, name, "job_step") if one["job"] == digest[:12]]


def test_an_owner_submits_watches_and_is_given_the_model(service: LocalService) -> None:
    with tacit.connect(service.cluster, service.key("hospital")) as parties:
        jobs = parties.jobs
        digest = submitted(jobs, 6, reveal_loss=True)
        seen = list(jobs.watch("risk", losses=True))
        assert seen[-1].status.state is State.DONE
        assert seen[-1].status.step == seen[-1].status.checkpoint.step == 6
        losses = {step: loss for one in seen for step, loss in one.losses.items()}
        assert losses == jobs.losses(digest)
        assert list(losses) == list(range(1, 7))
        as_in_the_clear(jobs, digest, 6)
        assert [one.job for one in jobs.list()] == [digest]
        with pytest.raises(InputError, match="owner with this key and no client"):
            parties.model("risk")
    for name in ("alice", "bob"):
        assert len(tickets(service, name, digest)) == len(set(tickets(service, name, digest))) == 6


def test_a_stranger_can_do_nothing_and_a_contributor_little(service: LocalService) -> None:
    inputs, labels = examples()
    with (
        jobs_of(service, "hospital") as hospital,
        jobs_of(service, "bank") as bank,
        jobs_of(service, "stranger") as other,
    ):
        digest = hospital.submit(
            Training(network()), inputs[:16], labels[:16], name="both", steps=200, batch_size=8, data={"bank": 8}
        )
        assert hospital.status(digest).state is State.SUBMITTED
        until(lambda: hospital.status(digest).waiting.startswith("for the rows of"))
        with pytest.raises(InputError, match="say what the job both is to compute"):
            bank.contribute(digest, inputs[16:], labels[16:])
        with pytest.raises(InputError, match="computes something else"):
            bank.contribute(digest, inputs[16:], labels[16:], computes="0" * 64)
        with pytest.raises(InputError, match="takes 8 rows of yours"):
            bank.contribute(digest, inputs, labels, computes=Training(network()))
        bank.contribute(digest, inputs[16:], labels[16:], computes=Training(network()))
        until(lambda: bank.status(digest).step >= 2)
        assert not bank.status(digest).mine
        for refused in (bank.cancel, bank.resume, bank.delete, bank.result, bank.losses):
            with pytest.raises(NotPermitted, match="belongs to another owner"):
                refused(digest)
        assert other.list() == []
        for unknown in (
            other.status, other.cancel, other.resume, other.delete, other.describe, other.result, other.losses,
            lambda job: other.contribute(job, inputs, labels, computes=Training(network())),
        ):  # fmt: skip
            with pytest.raises(InputError, match="there is no job"):
                unknown(digest)
        with pytest.raises(InputError, match="does not reveal its loss"):
            hospital.losses(digest)
        hospital.cancel(digest)
        status = hospital.status(digest)
        assert status.state is State.CANCELLED
        assert 2 <= status.step == status.checkpoint.step < 200
        as_in_the_clear(hospital, digest, status.step)
        hospital.delete(digest)
        assert digest not in {one.job for one in hospital.list()}
        for name in ("alice", "bob", "provider"):
            assert not list((service.folder / name / "jobs" / "files").glob(f"{digest}*"))


def test_the_same_from_the_terminal(service: LocalService, tmp_path: Path) -> None:
    inputs, labels = examples()
    np.save(tmp_path / "x.npy", inputs.numpy())
    np.save(tmp_path / "y.npy", labels.numpy())
    (tmp_path / "net.py").write_text("from jobs_parties import network\n")
    everybody = ["--key", f"{service.folder}/hospital.key", "--config", f"{service.folder}/{CLUSTER}"]
    rows = ["--inputs", f"{tmp_path}/x.npy", "--labels", f"{tmp_path}/y.npy"]

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["job", *arguments, *everybody])
        assert done.exit_code == 0, done.output
        return done.stdout

    submitting = ("submit", f"{tmp_path}/net.py:network", *rows, "--steps", "3", "--batch-size", "8", "--name", "cli")
    digest = run(*submitting).strip()
    assert json.loads(run("watch", "cli", "--json"))["state"] == "done"
    assert digest in {one["job"] for one in json.loads(run("list", "--json"))}
    run("result", digest[:10], f"{tmp_path}/out.safetensors")
    network().load_state_dict(load_file(tmp_path / "out.safetensors"))
    run("delete", "cli")
    assert digest not in run("list", "--json")


def kill(name: str) -> Callable[[LocalService, str], None]:
    def killed(service: LocalService, digest: str) -> None:
        service.stop(name, signal.SIGKILL)
        time.sleep(0.5)
        service.start(name)

    return killed


def stop(name: str) -> Callable[[LocalService, str], None]:
    def stopped(service: LocalService, digest: str) -> None:
        assert service.stop(name) == 0
        service.start(name)

    return stopped


def kill_worker(name: str) -> Callable[[LocalService, str], None]:
    def killed(service: LocalService, digest: str) -> None:
        os.kill(int(str(facts(service, name, "job_runs")[-1]["pid"])), signal.SIGKILL)

    return killed


FAULTS = {
    "alice is killed": kill("alice"),
    "bob is killed": kill("bob"),
    "the provider is killed": kill("provider"),
    "alice's worker is killed": kill_worker("alice"),
    "bob's worker is killed": kill_worker("bob"),
    "alice is stopped": stop("alice"),
    "bob is stopped": stop("bob"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_is_killed_the_job_ends_as_if_nothing_had_been(service: LocalService, fault: str) -> None:
    with jobs_of(service, "hospital") as jobs:
        service.wait_ready()
        digest = submitted(jobs, 30, every=5, name="again")
        until(lambda: jobs.status(digest).step >= 8)
        FAULTS[fault](service, digest)
        *_, last = jobs.watch(digest)
        assert last.status.state is State.DONE
        as_in_the_clear(jobs, digest, 30)
        for name in ("alice", "bob"):
            used = tickets(service, name, digest)
            assert len(used) == len(set(used)) >= 30, "no ticket is used twice"
        jobs.delete(digest)


def test_logs_and_disks_of_the_parties_show_nothing_of_the_rows(service: LocalService) -> None:
    inputs, _ = examples()
    raw = inputs.double().numpy().tobytes()
    words = (inputs.double() * 2**16).round().to(torch.int64).numpy().tobytes()
    for path in Path(service.folder).rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert raw[:16] not in content
            assert words[:16] not in content
