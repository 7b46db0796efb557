"""Each algorithm against its paper's equations, written out again in NumPy or with one module a client."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tacit.data.examples import Examples
from tacit.errors import InputError
from tacit.federated.algorithm import SCALARS_BYTES, Algorithm, Memory, ServerState, Update
from tacit.federated.ditto import Ditto
from tacit.federated.fedavg import FedAvg, uniform
from tacit.federated.fedopt import fed_adagrad, fed_adam, fed_avg_m, fed_yogi
from tacit.federated.fedprox import FedProx
from tacit.federated.fedsgd import fed_sgd
from tacit.federated.local.plain import PlainSolver
from tacit.federated.personal import PersonalLayers, batch_norm_layers
from tacit.federated.scaffold import CONTROL, Scaffold
from tacit.runtimes.executors import one_thread

INPUTS, CLASSES = 5, 3
Vector = np.ndarray


@pytest.fixture(autouse=True)
def on_one_thread() -> Iterator[None]:
    """The fastest for what is as small as here."""
    with one_thread():
        yield


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def examples(n: int, seed: int) -> Examples:
    """Every client has a taste for one class, so that clients disagree."""
    g = seeded(seed)
    targets = torch.randint(CLASSES, (n,), generator=g)
    targets[: n // 2] = seed % CLASSES
    centres = torch.eye(CLASSES, INPUTS, dtype=torch.float64)
    return Examples(torch.randn(n, INPUTS, generator=g, dtype=torch.float64) + centres[targets], targets)


CLIENTS = [examples(8 + 3 * k, k) for k in range(4)]
COHORTS = [(0, 1), (1, 2, 3), (0, 3), (0, 1, 2)]


def regression() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(INPUTS, CLASSES).double()


def train(
    algorithm: Algorithm,
    model: nn.Module,
    cohorts: Sequence[Sequence[int]] = COHORTS,
    clients: Sequence[Examples] = CLIENTS,
) -> tuple[ServerState, dict[int, Memory], list[Update]]:
    """Rounds as every runtime does them; the last cohort's updates come with the result."""
    solver = PlainSolver(model, functional.cross_entropy)
    state, memories, updates = algorithm.init(model, len(clients)), {}, []
    for number, cohort in enumerate(cohorts):
        updates = []
        for k in cohort:
            generator = seeded(1000 * number + k)
            update, memories[k] = algorithm.client_update(state, memories.get(k, {}), solver, clients[k], generator)
            updates.append(update)
        state = algorithm.server_update(state, algorithm.combine(updates))
    return state, memories, updates


def start(model: nn.Module) -> Vector:
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])


def gradient(w: Vector, k: int) -> Vector:
    """Of client k's mean cross-entropy under softmax regression."""
    x, y = CLIENTS[k].inputs.numpy(), CLIENTS[k].targets.numpy()
    weight, bias = w[: INPUTS * CLASSES].reshape(CLASSES, INPUTS), w[INPUTS * CLASSES :]
    scores = np.exp(x @ weight.T + bias)
    error = scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[y]
    return np.concatenate([(error.T @ x / len(y)).ravel(), error.mean(0)])


def descend(w: Vector, k: int, lr: float, steps: int, drift: Callable[[Vector], Vector] = np.zeros_like) -> Vector:
    y = w.copy()
    for _ in range(steps):
        y = y - lr * (gradient(y, k) + drift(y))
    return y


def average(cohort: Sequence[int], of: Callable[[int], Vector]) -> Vector:
    sizes = [len(CLIENTS[k]) for k in cohort]
    return sum(size * of(k) for size, k in zip(sizes, cohort, strict=True)) / sum(sizes)


def close(state_or_vector: Tensor, expected: Vector) -> None:
    torch.testing.assert_close(state_or_vector, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


# FedSGD and FedProx


def test_fed_sgd_makes_the_step_of_the_pooled_gradient() -> None:
    pooled = Examples(torch.cat([c.inputs for c in CLIENTS]), torch.cat([c.targets for c in CLIENTS]))
    model = regression()
    state, _, _ = train(fed_sgd(0.3), model, [(0, 1, 2, 3)] * 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        functional.cross_entropy(model(pooled.inputs), pooled.targets).backward()
        optimizer.step()
    close(state.parameters, start(model))


def test_fed_prox_is_its_equation() -> None:
    model, mu, w = regression(), 0.7, start(regression())
    for cohort in COHORTS:
        here = w
        w = average(cohort, lambda k, here=here: descend(here, k, 0.2, 5, lambda y: mu * (y - here)))
    state, _, _ = train(FedProx(lr=0.2, batch_size=None, epochs=5, mu=mu), model)
    close(state.parameters, w)


def test_fed_prox_without_a_pull_is_fed_avg_bit_for_bit() -> None:
    with_pull, _, _ = train(FedProx(batch_size=4, mu=0.0), regression())
    without, _, _ = train(FedAvg(batch_size=4), regression())
    assert torch.equal(with_pull.parameters, without.parameters)


# SCAFFOLD


def scaffold_by_hand(w: Vector, lr: float, steps: int) -> tuple[Vector, Vector, list[Vector]]:
    c, own = np.zeros_like(w), [np.zeros_like(w) for _ in CLIENTS]
    for cohort in COHORTS:
        moved, changed = np.zeros_like(w), np.zeros_like(w)
        for k in cohort:
            y = descend(w, k, lr, steps, lambda _, k=k, c=c: c - own[k])
            new = own[k] - c + (w - y) / (steps * lr)
            moved, changed = moved + (y - w) / len(cohort), changed + (new - own[k])
            own[k] = new
        w, c = w + moved, c + changed / len(CLIENTS)
    return w, c, own


def test_scaffold_is_option_two_of_the_paper() -> None:
    model = regression()
    w, c, own = scaffold_by_hand(start(model), 0.2, 4)
    state, memories, _ = train(Scaffold(lr=0.2, batch_size=None, epochs=4), model)
    close(state.parameters, w)
    close(state.shared[CONTROL], c)
    for k, control in enumerate(own):
        close(memories[k][CONTROL], control)


def test_the_server_control_stays_the_mean_of_the_clients() -> None:
    state, memories, _ = train(Scaffold(lr=0.1, batch_size=3), regression())
    mean = sum(memory[CONTROL] for memory in memories.values()) / len(CLIENTS)
    torch.testing.assert_close(state.shared[CONTROL], mean)


def test_scaffold_with_one_client_is_fed_avg() -> None:
    alone, rounds = CLIENTS[:1], [(0,)] * 4
    corrected, _, _ = train(Scaffold(batch_size=4), regression(), rounds, alone)
    plain, _, _ = train(FedAvg(batch_size=4), regression(), rounds, alone)
    torch.testing.assert_close(corrected.parameters, plain.parameters, rtol=1e-12, atol=1e-14)


def test_scaffold_sends_and_receives_twice_the_bytes() -> None:
    size = 8 * (INPUTS + 1) * CLASSES
    state, _, updates = train(Scaffold(), regression())
    assert state.nbytes == 2 * size
    assert {update.nbytes for update in updates} == {2 * size + SCALARS_BYTES}


def pooled_gradient_norm(w: Tensor) -> float:
    return float(np.linalg.norm(np.mean([gradient(w.numpy(), k) for k in range(len(CLIENTS))], axis=0)))


def test_drift_biases_fed_avg_less_with_a_pull_and_not_under_scaffold() -> None:
    """With all clients, whole batches and many local steps, FedAvg stops beside the optimum of the mean loss."""
    everyone = [(0, 1, 2, 3)] * 30
    settings = {"lr": 0.8, "batch_size": None, "epochs": 8, "weighting": uniform}
    ends = [train(a, regression(), everyone)[0] for a in (FedAvg(**settings), FedProx(**settings, mu=1.0))]
    averaged, pulled = (pooled_gradient_norm(state.parameters) for state in ends)
    corrected = pooled_gradient_norm(train(Scaffold(**settings), regression(), everyone)[0].parameters)
    assert averaged > 0.05
    assert pulled < 0.85 * averaged
    assert corrected < 0.1 * averaged


# server optimizers


def servers(rule: str, deltas: list[Vector]) -> Vector:
    """Algorithm 2 of Reddi et al. 2021, and FedAvgM, from w = 0."""
    w, m, lr, tau, beta1, beta2 = np.zeros(3), np.zeros(3), 0.3, 0.02, 0.9, 0.99
    v = np.full(3, tau**2)
    for d in deltas:
        if rule == "momentum":
            m = beta1 * m + d
            w = w + lr * m
            continue
        m = d if rule == "adagrad" else beta1 * m + (1 - beta1) * d
        if rule == "adagrad":
            v = v + d**2
        elif rule == "adam":
            v = beta2 * v + (1 - beta2) * d**2
        else:
            v = v - (1 - beta2) * d**2 * np.sign(v - d**2)
        w = w + lr * m / (np.sqrt(v) + tau)
    return w


OPTIMIZERS = {
    "momentum": fed_avg_m(FedAvg(), server_lr=0.3, momentum=0.9),
    "adagrad": fed_adagrad(FedAvg(), server_lr=0.3, tau=0.02),
    "adam": fed_adam(FedAvg(), server_lr=0.3, betas=(0.9, 0.99), tau=0.02),
    "yogi": fed_yogi(FedAvg(), server_lr=0.3, betas=(0.9, 0.99), tau=0.02),
}


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_server_optimizers_are_the_paper_s(rule: str) -> None:
    deltas = [np.array(d) for d in ([0.1, -0.5, 0.0], [0.2, 0.1, 1e-3], [-0.3, 0.01, 0.05], [0.0, 0.4, -0.2])]
    algorithm, model = OPTIMIZERS[rule], nn.Linear(2, 1).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    state = algorithm.init(model, 4)
    for delta in deltas:
        state = algorithm.server_update(state, Update.of_client(torch.from_numpy(delta), {}, 1, 0.0))
    close(state.parameters, servers(rule, deltas))


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_server_optimizers_resume_from_their_state(rule: str) -> None:
    whole, _, _ = train(OPTIMIZERS[rule], regression(), COHORTS)
    copied = copy.deepcopy(whole)
    update = Update.of_client(torch.ones_like(whole.parameters), {}, 1, 0.0)
    first, second = (OPTIMIZERS[rule].server_update(state, update) for state in (whole, copied))
    assert torch.equal(first.parameters, second.parameters)
    assert torch.equal(whole.parameters, copied.parameters)


def test_any_client_algorithm_takes_a_server_optimizer() -> None:
    algorithm = fed_adam(Scaffold(lr=0.2))
    assert isinstance(algorithm, Scaffold)
    assert algorithm.lr == 0.2
    state, _, _ = train(algorithm, regression())
    assert state.parameters.isfinite().all()


# personalisation


def network(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(8)
    middle = nn.BatchNorm1d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(INPUTS, 4), middle, nn.Linear(4, CLASSES)).double()


def with_a_module_a_client(personal: Callable[[str], bool], norm: bool, lr: float, epochs: int) -> list[nn.Module]:
    """Averaging over whole modules, one a client, that keep the personal entries of their state dicts."""
    modules = [network(norm) for _ in CLIENTS]
    common = {name: value.clone() for name, value in modules[0].state_dict().items() if not personal(name)}
    for cohort in COHORTS:
        for k in cohort:
            modules[k].load_state_dict(common, strict=False)
            optimizer = torch.optim.SGD(modules[k].train().parameters(), lr=lr)
            for _ in range(epochs):
                optimizer.zero_grad()
                functional.cross_entropy(modules[k](CLIENTS[k].inputs), CLIENTS[k].targets).backward()
                optimizer.step()
        sizes = torch.tensor([len(CLIENTS[k]) for k in cohort], dtype=torch.float64)
        shares = (sizes / sizes.sum()).tolist()
        states = [modules[k].state_dict() for k in cohort]
        common = {name: sum(s * state[name] for s, state in zip(shares, states, strict=True)) for name in common}
    for module in modules:
        module.load_state_dict(common, strict=False)
    return modules


@pytest.mark.parametrize(
    ("norm", "layers"), [(False, ("2",)), (True, ("1",)), (True, ("1", "2.bias"))], ids=["FedPer", "FedBN", "both"]
)
def test_personal_layers_against_a_module_a_client(norm: bool, layers: tuple[str, ...]) -> None:
    def personal(name: str) -> bool:
        return name in layers or name.split(".")[0] in layers

    model = network(norm)
    algorithm = PersonalLayers(FedAvg(lr=0.2, batch_size=None, epochs=3), layers)
    state, memories, updates = train(algorithm, model)
    layout = PlainSolver(model, functional.cross_entropy).layout
    for k, expected in enumerate(with_a_module_a_client(personal, norm, 0.2, 3)):
        algorithm.personalise(state, memories[k], layout).load_into(model)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-9, atol=1e-12)
        assert set(memories[k]) == {name for name in model.state_dict() if personal(name)}
    sent = sum(v.nbytes for name, v in model.state_dict().items() if not personal(name))
    assert state.nbytes == sent
    assert {update.nbytes for update in updates} == {sent + SCALARS_BYTES}


def test_fed_bn_finds_its_layers() -> None:
    assert batch_norm_layers(network(norm=True)) == ("1",)
    with pytest.raises(InputError, match="no batch normalisation"):
        batch_norm_layers(network())


def test_personal_layers_train_with_a_pull_too() -> None:
    algorithm = PersonalLayers(FedProx(lr=0.1, mu=0.5), ("2",))
    state, _, _ = train(algorithm, network())
    free, _, _ = train(PersonalLayers(FedAvg(lr=0.1), ("2",)), network())
    assert not torch.equal(state.parameters, free.parameters)


def test_the_callers_model_keeps_its_gradients_on() -> None:
    model = network()
    PersonalLayers(FedAvg(), ("2",)).init(model, 3)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("averaging", "layers", "complaint"),
    [
        (FedAvg(), ("9",), "layers='9': the model has no such layer"),
        (FedAvg(), ("0", "2"), "nothing to train"),
        (Scaffold(), ("2",), "sends scaffold.control"),
    ],
)
def test_impossible_personal_layers(averaging: FedAvg, layers: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        PersonalLayers(averaging, layers).init(network(), 4)


def test_ditto_is_its_equations() -> None:
    model, pull, w = regression(), 0.4, start(regression())
    own: dict[int, Vector] = {}
    for cohort in COHORTS:
        for k in cohort:
            own[k] = descend(own.get(k, w), k, 0.2, 3, lambda v, w=w: pull * (v - w))
        w = average(cohort, lambda k, w=w: descend(w, k, 0.2, 3))
    algorithm = Ditto(lr=0.2, batch_size=None, epochs=3, pull=pull)
    state, memories, _ = train(algorithm, model)
    close(state.parameters, w)
    for k, expected in own.items():
        close(algorithm.personalise(state, memories[k], state.layout).parameters, expected)
    assert algorithm.personalise(state, {}, state.layout) is state


def test_ditto_s_global_model_is_fed_avg_s_bit_for_bit() -> None:
    ditto, memories, updates = train(Ditto(batch_size=6), network(norm=True))
    plain, _, expected = train(FedAvg(batch_size=6), network(norm=True))
    assert torch.equal(ditto.parameters, plain.parameters)
    assert [u.nbytes for u in updates] == [u.nbytes for u in expected]
    personal = Ditto().personalise(ditto, memories[0], ditto.layout)
    assert personal.buffers["1.running_mean"].shape == (4,)
    assert not torch.equal(personal.buffers["1.running_mean"], ditto.buffers["1.running_mean"])


# bad settings


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: fed_sgd(0.0), "lr=0.0: "),
        (lambda: FedProx(mu=-1.0), r"mu=-1\.0: "),
        (lambda: FedProx(mu=math.inf), "mu=inf: "),
        (lambda: FedProx(lr=0.0), "lr=0.0: "),
        (lambda: Scaffold(epochs=0), "epochs=0: "),
        (lambda: Ditto(pull=math.nan), "pull=nan: "),
        (lambda: PersonalLayers(), r"layers=\(\): name at least one"),
        (lambda: fed_avg_m(FedAvg(), momentum=1.0), r"momentum=1\.0: .*\[0, 1\)"),
        (lambda: fed_avg_m(FedAvg(), server_lr=0.0), r"server_lr=0\.0: "),
        (lambda: fed_adam(FedAvg(), betas=(0.9, 1.0)), r"betas=1\.0: "),
        (lambda: fed_yogi(FedAvg(), tau=0.0), r"tau=0\.0: "),
        (lambda: fed_adagrad(FedAvg(), tau=-1.0), r"tau=-1\.0: "),
    ],
)
def test_bad_settings_are_named(make: Callable[[], object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_settings_of_every_kind_can_be_changed() -> None:
    assert replace(FedProx(mu=0.3), lr=0.5) == FedProx(mu=0.3, lr=0.5)
