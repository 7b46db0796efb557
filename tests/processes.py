"""A federation of four sites in real processes, for the tests: its files, a federation over its SuperLink, the same in
this process, and processes that are started in other ways.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

from namespaces import Namespaces
from sites import Clock, answering, grid_of, tables, write_files
from tacit.data.examples import Examples
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Uniform
from tacit.federated.transcript import Transcript, run_digest
from tacit.identity import Identity
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.client_app import HELLO
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.federation_file import FederationFile
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.strategy import reached
from tacit.runtimes.flower.superlink import SuperLink
from tacit.sites.launch import LOOPBACK, Federation, Processes

NAMES = ("s0", "s1", "s2", "s3")
CLEAR = """
seed = 3
runtime = "flower"
[data]
dataset = "sites"
shape = [4]
classes = 2
[model]
name = "logistic"
[algorithm]
name = "fedavg"
lr = 0.3
batch_size = 8
[selection]
name = "uniform"
cohort = 4
[rounds]
number = 6
evaluate_every = 6
"""
MASKED = CLEAR + "[secure_sum]\nmost_examples = 50\n"
LONG = MASKED.replace("number = 6", "number = 600")
OPEN = 'privacy = "none"\nclear = true\n'
DISTRIBUTED = (
    MASKED
    + """
[privacy]
level = "distributed"
clip = 1.0
delta = 1e-3
noise_multiplier = 2.0
"""
)
EVERYBODY = 240.0
"""Seconds within which all processes are up, on a machine that has other things to do."""
PATIENT = Timing(work=120, stage=60, linger=2, gather=EVERYBODY, join=EVERYBODY)


def write(
    folder: Path, *, training: float = 1.0, host: str = LOOPBACK, insecure: bool = False, allow: str = OPEN
) -> tuple[Federation, list[Examples]]:
    """A federation whose sites answer in the clear and secretly, and their examples."""
    federation, examples = Federation.make(folder, NAMES, host=host, insecure=insecure), tables(4)
    for name, own in zip(NAMES, examples, strict=True):
        np.save(folder / f"{name}.x.npy", own.inputs.numpy())
        np.save(folder / f"{name}.y.npy", own.targets.numpy())
        data = f'format = "numpy"\ninputs = "{name}.x.npy"\ntargets = "{name}.y.npy"\ntraining = {training}\n'
        federation.site(name, data, allow)
    return federation, examples


def through(federation: Federation, port: int) -> None:
    """Have everybody reach the SuperLink at another port."""
    path = federation.folder / "federation.toml"
    path.write_text(path.read_text().replace(f":{federation.port}", f":{port}"))


@contextmanager
def coordinated(federation: Federation, text: str, timing: Timing = PATIENT) -> Iterator[SiteFederation]:
    """What `tacit train` makes of such a configuration, without a run's folder."""
    folder = federation.folder
    file, coordinator = FederationFile.read(folder / "federation.toml"), Identity.load(folder / "coordinator.key")
    link = SuperLink(file.superlink, (folder / "superlink.secret").read_bytes())
    for site in file.sites:
        link.register(site.node)
    with link.run() as (_, grid):
        yield over_grid(grid, coordinator, file, text, timing)


def over_grid(grid: Grid, coordinator: Identity, file: FederationFile, text: str, timing: Timing) -> SiteFederation:
    """A federation over the sites of a grid."""
    settings, own = config.parse(text), Identity.fresh()
    secure, transcript = settings.secure_sum, None
    model = build.model(settings, signature(settings).blank(), Path())
    sites = reached(
        grid, coordinator, Terms(own.public, text, file.keys), None if secure is None else Policy(3), None, timing
    )
    if secure is not None:
        transcript = Transcript(run_digest(text.encode(), own.public), own, lambda entry: None)
    return SiteFederation(
        model,
        sites,
        None if secure is None else secure.most_examples,
        algorithm=build.algorithm(settings, model),
        selection=Uniform(4),
        secure_mean=None if secure is None else SecureMean(sites, secure.clip, secure.bits),
        transcript=transcript,
        seed=settings.seed,
    )


def in_one_process(
    folder: Path, text: str, cohorts: Sequence[Sequence[int]], *, training: float = 1.0
) -> dict[str, torch.Tensor]:
    """The global model after rounds that these finished, of the same four sites, the others lost before they train."""
    folder.mkdir()
    files = write_files(folder, tables(4), OPEN, training)
    with answering(files, 4) as sites:
        grid = grid_of(sites)
        made = over_grid(grid, files.coordinator, files.federation, text, Timing(work=9, stage=9, gather=9, join=9))
        clock = Clock()
        made.sites.asking.courier.clock, made.sites.asking.courier.sleep = clock.now, clock.sleep
        for cohort in cohorts:
            finish = {100 + index for index in cohort}

            def meddle(stage: str, node: int, message: Message, finish: set[int] = finish) -> Message | None:
                return message if stage == HELLO or node in finish else None

            grid.meddle = meddle
            assert made.advance().cohort == tuple(cohort)
        return made.model().state_dict()


class Credulous(Processes):
    """Sites that take every signature on a letter for a good one."""

    def _command(self, name: str, code: str, arguments: Sequence[str]) -> list[str]:
        believing = "from tacit.runtimes.flower import messages; messages.verify = lambda *what: True; "
        return super()._command(name, code if name == "superlink" else believing + code, arguments)


class OnMachines(Processes):
    """Each process on a machine of its own, which has its name."""

    def __init__(self, federation: Federation, machines: Namespaces) -> None:
        super().__init__(federation)
        self.machines = machines

    def _command(self, name: str, code: str, arguments: Sequence[str]) -> list[str]:
        return self.machines.command(name, super()._command(name, code, arguments))

    def _listens(self, host: str, port: int) -> bool:
        probe = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1)"
        return self.machines.run("superlink", [sys.executable, "-c", probe, host, str(port)]) == 0


def everybody(federation: SiteFederation) -> None:
    """Wait until all four sites are there."""
    assert len(federation.sites.asking.presence.await_some(4, EVERYBODY)) == 4


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
