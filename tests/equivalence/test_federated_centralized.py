"""Federated averaging against what it must equal: centralized training, torch's optimizers, any order of clients."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.federated.algorithm import Update
from tacit.federated.fedavg import FedAvg
from tacit.federated.generators import generator_for
from tacit.federated.local.plain import PlainSolver
from tacit.runtimes.simulation import federate


def examples(n: int, seed: int) -> Examples:
    g = torch.Generator().manual_seed(seed)
    return Examples(torch.rand(n, 1, 8, 8, generator=g), torch.randint(4, (n,), generator=g))


def network() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 16), nn.Tanh(), nn.Linear(16, 4))


def centralized(model: nn.Module, batches: list[Examples], optimizer: torch.optim.Optimizer) -> None:
    for batch in batches:
        optimizer.zero_grad()
        functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()


def assert_equal_models(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


def union(clients: list[Examples]) -> Examples:
    return Examples(torch.cat([c.inputs for c in clients]), torch.cat([c.targets for c in clients]))


def in_float64(own: Examples) -> Examples:
    """Adaptive optimizers divide by the gradient's size, so in float32 rounding decides small steps."""
    return Examples(own.inputs.double(), own.targets)


def test_one_client_full_batch_is_a_centralized_gradient_step() -> None:
    data, model = examples(50, 0), network()
    run = federate(model, [data], algorithm=FedAvg(lr=0.3, batch_size=None), rounds=1, cohort=1, initial="default")
    reference = copy.deepcopy(model)
    centralized(reference, [data], torch.optim.SGD(reference.parameters(), lr=0.3))
    assert_equal_models(run.model, reference)


def test_one_client_with_epochs_and_batches_is_torch_sgd_over_the_same_batches() -> None:
    seen: list[Tensor] = []
    data, model, algorithm = examples(23, 1), network(), FedAvg(lr=0.1, batch_size=5, epochs=3)
    worker = copy.deepcopy(model)
    worker[0].register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    state = algorithm.init(model, clients=1)
    solver = PlainSolver(worker, functional.cross_entropy)
    sent, _ = algorithm.client_update(state, {}, solver, data, torch.Generator().manual_seed(2))
    trained = algorithm.server_update(state, algorithm.combine([sent]))

    by_row = {row.sum().item(): target for row, target in zip(data.inputs, data.targets, strict=True)}
    batches = [Examples(x, torch.stack([by_row[row.sum().item()] for row in x])) for x in seen]
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3] * 3
    reference = copy.deepcopy(model)
    centralized(reference, batches, torch.optim.SGD(reference.parameters(), lr=0.1))
    trained.load_into(worker)
    assert_equal_models(worker, reference)


def test_full_batches_over_unequal_clients_are_gradient_steps_on_their_union() -> None:
    clients, model = [examples(n, n) for n in (5, 17, 40, 1)], network()
    run = federate(model, clients, algorithm=FedAvg(lr=0.2, batch_size=None), rounds=5, cohort=4, initial="default")
    reference = copy.deepcopy(model)
    centralized(reference, [union(clients)] * 5, torch.optim.SGD(reference.parameters(), lr=0.2))
    assert_equal_models(run.model, reference)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.01),
        lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
    ],
    ids=["momentum", "nesterov", "adam", "adagrad"],
)
def test_a_server_optimizer_is_torchs_own_on_the_pseudo_gradient(
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
) -> None:
    clients = [in_float64(examples(n, n)) for n in (9, 30)]
    model = network().double()
    algorithm = FedAvg(lr=0.1, batch_size=None, server_optimizer=optimizer)
    solver, state = PlainSolver(model, functional.cross_entropy), algorithm.init(model, clients=2)
    reference = copy.deepcopy(model)
    theirs = optimizer(list(reference.parameters()))
    for round_number in range(4):
        generators = [torch.Generator().manual_seed(round_number) for _ in clients]
        state = algorithm.server_update(
            state,
            algorithm.combine(
                algorithm.client_update(state, {}, solver, own, generator)[0]
                for own, generator in zip(clients, generators, strict=True)
            ),
        )
        # One full-batch step at rate η makes the pseudo-gradient η times the gradient on the union.
        pooled = union(clients)
        loss = functional.cross_entropy(reference(pooled.inputs), pooled.targets)
        theirs.zero_grad()
        (0.1 * loss).backward()
        theirs.step()
    state.load_into(model)
    assert_equal_models(model, reference)


def test_momentum_by_hand_on_given_pseudo_gradients() -> None:
    algorithm = FedAvg(server_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9))
    state = algorithm.init(nn.Linear(1, 1, bias=False), clients=1)
    weight, velocity = state.parameters.item(), 0.0
    for delta in (1.0, -0.25, 2.0):
        state = algorithm.server_update(state, Update(torch.tensor([delta]), {}, 1, 0.0, 0, 1.0))
        velocity = 0.9 * velocity + delta
        weight += 0.5 * velocity
        assert state.parameters.item() == pytest.approx(weight, abs=1e-6)


def test_the_order_in_which_clients_train_does_not_matter() -> None:
    clients, model, algorithm = [examples(n, n) for n in (9, 30, 12)], network(), FedAvg(lr=0.2, batch_size=4)
    run = federate(model, clients, algorithm=algorithm, rounds=2, cohort=3, seed=11, initial="default")
    solver, state = PlainSolver(model, functional.cross_entropy), algorithm.init(model, clients=3)
    for number in (1, 2):
        updates = [
            algorithm.client_update(
                state, {}, solver, clients[client], generator_for(11, "round", number, "client", client)
            )[0]
            for client in (2, 0, 1)
        ]
        state = algorithm.server_update(state, algorithm.combine(updates))
    state.load_into(model)
    assert_equal_models(run.model, model)
