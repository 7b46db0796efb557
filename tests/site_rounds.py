"""Rounds over sites in this process, and over the simulator, for the tests."""

from __future__ import annotations

import torch
from torch import nn

from sites import Clock, Files, LocalGrid, Meddle
from tacit.data.examples import Examples
from tacit.federated.devices_schedule import RoundPolicy
from tacit.federated.fedavg import FedAvg
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.selection import Selection, Uniform
from tacit.federated.transcript import Transcript, run_digest
from tacit.identity import Identity
from tacit.runs import build, config
from tacit.runs.data import signature
from tacit.runtimes.flower.asking import Timing
from tacit.runtimes.flower.federation import SiteFederation
from tacit.runtimes.flower.messages import Terms
from tacit.runtimes.flower.strategy import reached
from tacit.runtimes.simulation import federate

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
number = 20
"""
MASKED = CLEAR + "[secure_sum]\nmost_examples = 50\n"
OPEN = 'privacy = "none"\nclear = true\n'
SECRET = 'privacy = "none"\n'
TIMING = Timing(work=20, stage=5, linger=0.0, gather=0.2, join=0.2)


def over_sites(
    files: Files,
    grid: LocalGrid,
    text: str = CLEAR,
    rounds: RoundPolicy | None = None,
    entries: list[bytes] | None = None,
    selection: Selection | None = None,
) -> SiteFederation:
    """A federation over the sites of a grid, as a coordinator makes it from a configuration."""
    settings, run = config.parse(text), Identity.fresh()
    secure, transcript = settings.secure_sum, None
    model = build.model(settings, signature(settings).blank(), files.folder)
    terms = Terms(run.public, text, files.federation.keys)
    sites = reached(grid, files.coordinator, terms, None if secure is None else Policy(3), rounds, TIMING)
    clock = Clock()
    sites.asking.courier.clock, sites.asking.courier.sleep = clock.now, clock.sleep
    if secure is not None:
        keep = entries.append if entries is not None else lambda entry: None
        transcript = Transcript(run_digest(text.encode(), run.public), run, keep)
    return SiteFederation(
        model,
        sites,
        None if secure is None else secure.most_examples,
        algorithm=build.algorithm(settings, model),
        selection=selection or Uniform(4),
        secure_mean=None if secure is None else SecureMean(sites, secure.clip, secure.bits),
        transcript=transcript,
        seed=settings.seed,
    )


def simulated(examples: list[Examples], rounds: int, cohort: int = 4, **named):
    """The simulator's training with the same settings."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    algorithm = FedAvg(lr=0.3, batch_size=8)
    return federate(network, examples, algorithm=algorithm, rounds=rounds, cohort=cohort, seed=3, **named)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def lose(*stages: str, node: int) -> Meddle:
    """Have messages of these stages to a node get lost."""
    return lambda stage, at, message: None if at == node and stage in stages else message
