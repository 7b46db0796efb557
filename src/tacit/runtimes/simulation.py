"""Federated training in one process: the clients of a round train one after another."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import Algorithm, ServerState, Update
from tacit.federated.evaluation import evaluate
from tacit.federated.generators import generator_for
from tacit.federated.history import RoundRecord
from tacit.federated.initial import Initial, initialise
from tacit.federated.selection import uniform_cohort


@dataclass(frozen=True)
class FederatedRun:
    """The trained global model, and what each round did."""

    model: nn.Module
    history: tuple[RoundRecord, ...]


def federate(
    model: nn.Module,
    clients: Sequence[Examples],
    *,
    algorithm: Algorithm,
    rounds: int,
    cohort: int,
    seed: int = 0,
    initial: Initial = "he",
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
        clients: the examples of each client.
        algorithm: how clients train and how the server combines, such as `FedAvg`.
        rounds: communication rounds, at most.
        cohort: clients selected in each round, uniformly without replacement.
        seed: of the initial weights, the selection and the clients' shuffling.
        initial: see `tacit.federated.initial.initialise`; ``"default"`` continues from the model's own
            weights.
        test: held-out examples for the history's loss and accuracy.
        evaluate_every: evaluate on ``test`` after every so many rounds, and after the last.
        target_accuracy: stop after the first evaluation that reaches this fraction of correct answers.
        on_round: called with the record of each round as it ends.

    Raises:
        InputError: a setting is out of range, a client has no examples, or the training of a client diverged.
    """
    _check(clients, rounds, test, evaluate_every, target_accuracy)
    worker = copy.deepcopy(model)
    initialise(worker, initial, generator_for(seed, "initial"))
    state = algorithm.init(worker)
    history: list[RoundRecord] = []
    for number in range(1, rounds + 1):
        started = time.perf_counter()
        selected = uniform_cohort(len(clients), cohort, generator_for(seed, "round", number, "cohort"))
        bytes_down = len(selected) * state.nbytes
        with one_thread():
            mean = algorithm.combine(_updates(algorithm, state, worker, clients, selected, seed))
            state = algorithm.server_update(state, mean)
        loss = accuracy = None
        if test is not None and (number % evaluate_every == 0 or number == rounds):
            state.load_into(worker)
            loss, accuracy = evaluate(worker, test)
        record = RoundRecord(
            round=number,
            cohort=selected,
            examples=mean.examples,
            loss=loss,
            accuracy=accuracy,
            bytes_up=mean.nbytes,
            bytes_down=bytes_down,
            seconds=time.perf_counter() - started,
        )
        history.append(record)
        if on_round is not None:
            on_round(record)
        if target_accuracy is not None and accuracy is not None and accuracy >= target_accuracy:
            break
    state.load_into(worker)
    return FederatedRun(worker.train(model.training), tuple(history))


def _updates(
    algorithm: Algorithm,
    state: ServerState,
    worker: nn.Module,
    clients: Sequence[Examples],
    selected: tuple[int, ...],
    seed: int,
) -> Iterator[Update]:
    """The cohort's updates, each made when it is asked for."""
    number = state.round + 1
    for client in selected:
        generator = generator_for(seed, "round", number, "client", client)
        update = algorithm.client_update(state, worker, clients[client], generator)
        if not update.is_finite():
            raise InputError(
                f"client {client} diverged in round {number} under {algorithm}: its update is not finite; "
                "lower lr, or look for inputs that are not finite or far outside [0, 1]"
            )
        yield update


def _check(
    clients: Sequence[Examples],
    rounds: int,
    test: Examples | None,
    evaluate_every: int,
    target_accuracy: float | None,
) -> None:
    if not clients:
        raise InputError("clients: the list is empty; give the examples of at least one client")
    for index, examples in enumerate(clients):
        if len(examples) == 0:
            raise InputError(f"clients[{index}] has no examples: leave it out, or split the data so that it has some")
    if test is not None and len(test) == 0:
        raise InputError("test has no examples to evaluate on: give at least one, or None not to evaluate")
    if rounds < 1:
        raise InputError(f"rounds={rounds}: train for at least 1 round")
    if evaluate_every < 1:
        raise InputError(f"evaluate_every={evaluate_every}: give 1 (after every round) or more")
    if target_accuracy is not None and not 0 < target_accuracy <= 1:
        raise InputError(f"target_accuracy={target_accuracy}: give a fraction above 0 and at most 1, such as 0.97")
    if target_accuracy is not None and test is None:
        raise InputError(f"target_accuracy={target_accuracy} needs test examples to measure it on: give test=")


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute with one thread; small batches take longer with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
