"""Federated training on this machine, from the caller's examples to the trained model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm
from tacit.federated.evaluation import evaluate
from tacit.federated.history import RoundRecord
from tacit.federated.initial import Initial
from tacit.federated.local.plain import PlainSolver
from tacit.federated.local.work import Loss
from tacit.federated.selection import Selection, Uniform
from tacit.runtimes.executors import InProcess
from tacit.runtimes.federation import Federation


@dataclass(frozen=True)
class FederatedRun:
    """The trained global model, and what each round did."""

    model: nn.Module
    history: tuple[RoundRecord, ...]


@dataclass(frozen=True)
class Evaluation:
    """When the global model is tried on held-out examples, and when its accuracy ends the training.

    Args:
        test: the held-out examples; ``None`` is never to evaluate.
        every: evaluate after every so many rounds, and after the last.
        target_accuracy: stop after the first evaluation that reaches this fraction of correct answers.

    Raises:
        InputError: a setting is out of range.
    """

    test: Examples | None = None
    every: int = 1
    target_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.test is not None and len(self.test) == 0:
            raise InputError("test has no examples to evaluate on: give at least one, or None not to evaluate")
        if self.every < 1:
            raise InputError(f"evaluate_every={self.every}: give 1 (after every round) or more")
        target = self.target_accuracy
        if target is not None and not 0 < target <= 1:
            raise InputError(f"target_accuracy={target}: give a fraction above 0 and at most 1, such as 0.97")
        if target is not None and self.test is None:
            raise InputError(f"target_accuracy={target} needs test examples to measure it on: give test=")


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
    on_round: Callable[[RoundRecord], None] | None = None,
) -> FederatedRun:
    """Train ``model`` over ``clients``; the caller's model and examples stay as they are.

    Equal arguments give bit-equal models on the same machine with the same number of torch threads: every
    random choice depends on ``seed``, the round and the client alone. Clients train on one thread, which is
    the fastest for networks and batches of this size; evaluation uses the caller's threads.

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
        on_round: called with the record of each round as it ends.

    Raises:
        InputError: a setting is out of range, or no client has examples.
        TrainingError: round after round, no client had an update that could be used, as when training diverges.
    """
    if rounds < 1:
        raise InputError(f"rounds={rounds}: train for at least 1 round")
    if (cohort is None) == (selection is None):
        raise InputError("give either cohort=, how many clients to draw uniformly in each round, or selection=")
    evaluation = Evaluation(test, evaluate_every, target_accuracy)
    sizes = example_counts(clients)
    executor = InProcess(PlainSolver(model, loss), clients)
    try:
        federation = Federation(
            model,
            executor,
            sizes,
            algorithm=algorithm,
            selection=selection or Uniform(cohort or 0),
            seed=seed,
            initial=initial,
        )
        history = []
        for record in advance(federation, rounds, evaluation):
            history.append(record)
            if on_round is not None:
                on_round(record)
    finally:
        executor.close()
    return FederatedRun(federation.model().train(model.training), tuple(history))


def advance(federation: Federation, rounds: int, evaluation: Evaluation) -> Iterator[RoundRecord]:
    """Train up to round ``rounds``, evaluating; ends earlier if the target accuracy is reached."""
    while federation.round < rounds:
        started = time.perf_counter()
        record = federation.advance()
        if evaluation.test is not None and (record.round % evaluation.every == 0 or record.round == rounds):
            loss, accuracy = evaluate(federation.model(), evaluation.test)
            record = replace(record, loss=loss, accuracy=accuracy, seconds=time.perf_counter() - started)
        yield record
        target = evaluation.target_accuracy
        if target is not None and record.accuracy is not None and record.accuracy >= target:
            return


def example_counts(clients: Sequence[Examples]) -> torch.Tensor:
    """How many examples each client has: int64 of shape ``(N,)``.

    Raises:
        InputError: there is no client, or none has examples.
    """
    if not clients:
        raise InputError("clients: the list is empty; give the examples of at least one client")
    sizes = torch.tensor([len(examples) for examples in clients])
    if not sizes.any():
        raise InputError(f"clients: none of the {len(clients)} clients has examples; give at least one some")
    return sizes
