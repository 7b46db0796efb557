"""Federated training on this machine, from the caller's examples to the trained model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.data.views import ClientViews
from tacit.dp.ledger import Ledger
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.evaluation import EarlyStop
from tacit.federated.history import RoundRecord
from tacit.federated.initial import Initial
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.traced import solver_for
from tacit.federated.local.work import LocalSolver, Loss
from tacit.federated.parties import Parties
from tacit.federated.privacy import Plan, Privacy, PrivacySpent, PrivateTraining
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.interface import SecureSum
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.federated.secure_sum.shared import SharedSum
from tacit.federated.selection import Selection, Uniform
from tacit.identity import Identity
from tacit.runtimes.executors import Executor
from tacit.runtimes.federation import Devices, Federation
from tacit.runtimes.forked import forked
from tacit.runtimes.grouped import Grouped, StackedSolver

SumProtocol = Literal["masked", "shared"]
LEAST_PART = 0.6
"""The part of the expected cohort that clients insist on before a secure sum reveals anything."""

Solver = Literal["auto", "plain", "stacked"]


@dataclass(frozen=True)
class FederatedRun:
    """What came of a federated training.

    Args:
        model: the trained global model.
        history: what each round did.
        privacy_spent: (ε, δ) of the whole run, and of what is in the ledger before it; ``None`` without
            differential privacy.
        notes: what was done in another way than asked, and why: a model that does not trace trains in the plain loop.
    """

    model: nn.Module
    history: tuple[RoundRecord, ...]
    privacy_spent: PrivacySpent | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SumSettings:
    """How a run sums updates without anybody seeing one.

    Args:
        protocol: ``"masked"``: one server, pairwise masks; ``"shared"``: two servers that hold shares.
        minimum: the fewest updates that clients let into a sum; ``None`` is three fifths of the expected cohort. The
            noise of `DistributedDP` is provisioned for them.
        clip: see `SecureMean`.
        bits: of an entry; see `SecureMean`.
        verified: have the two servers verify the norm of every update on shares; see `SecureMean`.
    """

    protocol: SumProtocol = "masked"
    minimum: int | None = None
    clip: float | None = None
    bits: int = 16
    verified: bool = False


@dataclass(frozen=True)
class Evaluation:
    """When the model is tried on examples that it was not trained on.

    Args:
        test: held-out examples for the global model; ``None`` is never to evaluate it, but see ``at_clients``.
        every: evaluate after every so many rounds, and after the last.
        clients: held-out examples of each client, for the accuracy at the clients; ``None`` is never to take it.
        clients_every: take it after every so many rounds, and after the last.
        at_clients: whether the global model is tried on what the clients keep back, who are elsewhere.

    Raises:
        InputError: a setting is out of range.
    """

    test: Examples | None = None
    every: int = 1
    clients: Sequence[Examples] | None = None
    clients_every: int = 1
    at_clients: bool = False

    def __post_init__(self) -> None:
        if self.test is not None and len(self.test) == 0:
            raise InputError("test has no examples to evaluate on: give at least one, or None not to evaluate")
        for name, value in (("evaluate_every", self.every), ("evaluate_clients_every", self.clients_every)):
            if value < 1:
                raise InputError(f"{name}={value}: give 1 (after every round) or more")


def federate(
    model: nn.Module,
    clients: Sequence[Examples],
    *,
    algorithm: Algorithm,
    rounds: int,
    cohort: int | None = None,
    selection: Selection | None = None,
    seed: int = 0,
    initial: Initial = "he",
    loss: Loss = functional.cross_entropy,
    test: Examples | None = None,
    evaluate_every: int = 1,
    target_accuracy: float | None = None,
    patience: int | None = None,
    devices: Devices | None = None,
    secure_sum: SumProtocol | SumSettings | SecureMean | None = None,
    privacy: Privacy | None = None,
    ledger: Ledger | None = None,
    client_tests: Sequence[Examples] | None = None,
    processes: int = 1,
    solver: Solver = "auto",
    on_round: Callable[[RoundRecord], None] | None = None,
) -> FederatedRun:
    """Train ``model`` over ``clients``; the caller's model and examples stay as they are.

    Equal arguments give bit-equal models on the same machine with the same number of torch threads: every
    random choice depends on ``seed``, the round and the client alone, so the number of processes changes nothing.
    Clients train on one thread, which is the fastest for networks and batches of this size; evaluation uses the
    caller's threads.

    Args:
        model: a classifier; its initial weights are drawn according to ``initial``.
        clients: the examples of each client. Those without any are never selected.
        algorithm: how clients train and how the server combines, such as `FedAvg`.
        rounds: communication rounds, at most.
        cohort: clients selected in each round, uniformly without replacement.
        selection: how clients are selected, in place of ``cohort``; see `tacit.federated.selection`.
        seed: of the initial weights, the selection and the clients' shuffling.
        initial: see `tacit.federated.initial.initialise`; ``"default"`` continues from the model's own
            weights.
        loss: mean loss of a batch from the model's outputs and the targets.
        test: held-out examples for the history's loss and accuracy.
        evaluate_every: evaluate on ``test`` after every so many rounds, and after the last.
        target_accuracy: stop after the first evaluation that reaches this fraction of correct answers.
        patience: stop after so many evaluations in a row without a new best accuracy.
        devices: simulated devices that the clients run on; the history then tells the virtual clock.
        secure_sum: ``"masked"``: the server sees the sum of the cohort's updates and no single one, by the real
            protocol between simulated clients, who insist on three fifths of the cohort; ``"shared"``: so do two
            servers that hold shares; `SumSettings` with a minimum of your own, or norms verified on shares; or a
            `SecureMean`.
        privacy: differential privacy: `CentralDP` of whole clients by noise at the server, `DistributedDP` by noise in
            a secure sum, or `RecordDP` of single examples.
        ledger: where what is spent is written down; ``None``: a new one that ends with the run.
        client_tests: held-out examples of each client, for the history's accuracy at the clients.
        processes: how many processes train clients, best one a core; they are forked from this one.
        solver: ``"auto"`` replays a traced training step where the model allows it, two to three times as fast for
            small networks; ``"plain"`` is the loop over autograd; ``"stacked"`` trains groups of clients together, on a
            GPU if there is one, where alone it pays.
        on_round: called with the record of each round as it ends.

    Raises:
        InputError: a setting is out of range, or no client has examples.
        TrainingError: round after round, no client had an update that could be used, as when training diverges.
        BudgetExceeded: the next round would exceed the privacy budget.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: train for at least 1 round")
    if (cohort is None) == (selection is None):
        raise InputError("give either cohort=, how many clients to draw uniformly in each round, or selection=")
    if target_accuracy is not None and test is None:
        raise InputError(f"target_accuracy={target_accuracy} needs test examples to measure it on: give test=")
    stop = EarlyStop(target_accuracy, patience)
    evaluation = Evaluation(test, evaluate_every, client_tests, evaluate_every)
    sizes = example_counts(clients)
    chosen = selection or Uniform(cohort or 0)
    secure_mean, private = secure_mean_for(secure_sum, sizes, chosen), None
    if privacy is not None:
        plan = privacy_plan(model, loss, sizes, rounds, chosen, devices, secure_mean)
        private = privacy.start(algorithm, plan, ledger or Ledger())
    executor, notes = executor_for(model, loss, clients, processes, solver, private)
    with closing(executor):
        federation = Federation(
            model,
            executor,
            sizes,
            algorithm=algorithm,
            selection=chosen,
            devices=devices,
            secure_mean=secure_mean,
            private=private,
            seed=seed,
            initial=initial,
            loss=loss,
        )
        history: list[RoundRecord] = []
        for record in train(federation, rounds, evaluation, stop, history):
            if on_round is not None:
                on_round(record)
    spent = private.spent() if private else None
    return FederatedRun(federation.model().train(model.training), tuple(history), spent, notes)


def secure_mean_for(
    secure_sum: SumProtocol | SumSettings | SecureMean | None, sizes: torch.Tensor, selection: Selection
) -> SecureMean | None:
    """What `federate` says of ``secure_sum``."""
    if secure_sum is None or isinstance(secure_sum, SecureMean):
        return secure_sum
    s = secure_sum if isinstance(secure_sum, SumSettings) else SumSettings(secure_sum)
    return SecureMean(sum_protocol(s.protocol, sizes, selection, s.minimum), s.clip, s.bits, verified=s.verified)


def sum_protocol(
    name: SumProtocol,
    sizes: torch.Tensor,
    selection: Selection,
    minimum: int | None = None,
    parties: Parties | None = None,
) -> SecureSum:
    """A secure sum among clients that know one another's identities: new ones, unless the parties are given.

    They insist on ``minimum`` vectors in a sum, or on `LEAST_PART` of the expected cohort.
    """
    least = minimum or least_in_sum(sizes, selection)
    parties = parties or Parties.simulated(Identity.fresh(), len(sizes))
    if name == "masked":
        return MaskedSum(parties.clients, Policy(least))
    if name == "shared":
        return SharedSum(parties.clients, parties.alice, parties.bob, least)
    raise InputError(f"secure_sum={name!r}: choose one of {', '.join(get_args(SumProtocol))}, a SecureMean, or None")


def least_in_sum(sizes: torch.Tensor, selection: Selection) -> int:
    """The fewest vectors that clients let into a sum, where nothing else is asked: `LEAST_PART` of those expected."""
    return max(3, math.ceil(LEAST_PART * selection.expected(sizes)))


def executor_for(
    model: nn.Module,
    loss: Loss,
    clients: Sequence[Examples],
    processes: int,
    solver: Solver,
    private: PrivateTraining | None,
) -> tuple[Executor, tuple[str, ...]]:
    """What trains the clients, as `federate` says; and where it is not what was asked for, why."""
    if processes < 1:
        raise InputError(f"processes={processes}: train with 1 or more")
    if solver not in get_args(Solver):
        raise InputError(f"solver={solver!r}: choose one of {', '.join(get_args(Solver))}")
    notes = []
    chosen: LocalSolver
    if private is not None and private.solver is not None:
        chosen = private.solver
    elif solver == "stacked":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if processes > 1:
            notes.append(f"clients train in one process: stacked on {device.type}")
        return Grouped(StackedSolver(model, loss, device), clients), tuple(notes)
    elif solver == "plain":
        chosen = PlainSolver(model, loss)
    else:
        example = next(own for own in clients if len(own))
        chosen, reason = solver_for(model, loss, example.subset(torch.arange(min(10, len(example)))))
        if reason:
            notes.append(f"clients train in the plain loop: {reason}")
    executor, reason = forked(chosen, clients, processes)
    if reason and processes > 1:
        notes.append(f"clients train in one process: {reason}")
    return executor, tuple(notes)


def privacy_plan(
    model: nn.Module,
    loss: Loss,
    sizes: torch.Tensor,
    rounds: int,
    selection: Selection,
    devices: Devices | None,
    secure_mean: SecureMean | None = None,
    name: str = "run",
) -> Plan:
    """What privacy depends on of a training; sampling amplifies only where each client is drawn independently."""
    rate = selection.sampling_rate if devices is None else None
    expected = selection.expected(sizes)
    if devices is not None and devices.policy.close_at is not None:
        expected = min(expected, devices.policy.close_at)
    return Plan(model, loss, sizes, rounds, expected, rate, name, secure_mean)


def train(
    federation: Federation, rounds: int, evaluation: Evaluation, stop: EarlyStop, history: list[RoundRecord]
) -> Iterator[RoundRecord]:
    """Train up to round ``rounds``, evaluating, and append each record to ``history`` before it is yielded.

    Ends earlier if ``stop`` says so of the history.
    """
    while federation.round < rounds and not stop.reason(history):
        started = time.perf_counter()
        record = federation.advance()
        last = record.round == rounds
        tried = evaluation.test is not None or evaluation.at_clients
        if tried and (record.round % evaluation.every == 0 or last):
            loss, accuracy = federation.evaluate(evaluation.test)
            record = replace(record, loss=loss, accuracy=accuracy)
        if evaluation.clients is not None and (record.round % evaluation.clients_every == 0 or last):
            record = replace(record, clients=federation.evaluate_clients(evaluation.clients))
        history.append(replace(record, seconds=time.perf_counter() - started))
        yield history[-1]


def example_counts(clients: Sequence[Examples]) -> torch.Tensor:
    """How many examples each client has: int64 of shape ``(N,)``.

    Raises:
        InputError: there is no client, or none has examples.
    """
    if not clients:
        raise InputError("clients: the list is empty; give the examples of at least one client")
    sizes = clients.sizes() if isinstance(clients, ClientViews) else torch.tensor([len(own) for own in clients])
    if not sizes.any():
        raise InputError(f"clients: none of the {len(clients)} clients has examples; give at least one some")
    return sizes
