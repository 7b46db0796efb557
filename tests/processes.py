"""A federation of four sites in real processes, for the tests: its files, and a federation over its SuperLink."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from sites import tables
from tacit.data.examples import Examples
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Uniform
from tacit.federated.transcript import Transcript, run_digest
from tacit.identity import Identity
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.federation_file import FederationFile
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.strategy import reached
from tacit.runtimes.flower.superlink import SuperLink
from tacit.sites.launch import Federation

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
EVERYBODY = 240.0
"""Seconds within which all processes are up, on a machine that has other things to do."""
PATIENT = Timing(work=120, stage=60, linger=2, gather=EVERYBODY, join=EVERYBODY)


def write(folder: Path) -> tuple[Federation, list[Examples]]:
    """A federation whose sites answer in the clear and secretly, and their examples."""
    federation, examples = Federation.make(folder, NAMES), tables(4)
    for name, own in zip(NAMES, examples, strict=True):
        np.save(folder / f"{name}.x.npy", own.inputs.numpy())
        np.save(folder / f"{name}.y.npy", own.targets.numpy())
        data = f'format = "numpy"\ninputs = "{name}.x.npy"\ntargets = "{name}.y.npy"\n'
        federation.site(name, data, 'privacy = "none"\nclear = true\n')
    return federation, examples


@contextmanager
def coordinated(federation: Federation, text: str, timing: Timing = PATIENT) -> Iterator[SiteFederation]:
    """What `tacit train` makes of such a configuration, without a run's folder."""
    file, settings = FederationFile.read(federation.folder / "federation.toml"), config.parse(text)
    coordinator = Identity.load(federation.folder / "coordinator.key")
    link = SuperLink(file.superlink, (federation.folder / "superlink.secret").read_bytes())
    for site in file.sites:
        link.register(site.node)
    own, secure, transcript = Identity.fresh(), settings.secure_sum, None
    model = build.model(settings, signature(settings).blank(), federation.folder)
    with link.run() as (_, grid):
        terms = Terms(own.public, text, file.keys)
        sites = reached(grid, coordinator, terms, None if secure is None else Policy(3), None, timing)
        if secure is not None:
            transcript = Transcript(run_digest(text.encode(), own.public), own, lambda entry: None)
        yield SiteFederation(
            model,
            sites,
            None if secure is None else secure.most_examples,
            algorithm=build.algorithm(settings, model),
            selection=Uniform(4),
            secure_mean=None if secure is None else SecureMean(sites, secure.clip, secure.bits),
            transcript=transcript,
            seed=settings.seed,
        )


def everybody(federation: SiteFederation) -> None:
    """Wait until all four sites are there."""
    assert len(federation.sites.asking.presence.await_some(4, EVERYBODY)) == 4


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
