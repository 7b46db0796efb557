"""Federated averaging in Apple's pfl-research: `pfl_federated.py 2nn|cnn CLIENTS COHORT BATCH_SIZE ROUNDS`."""

import torch
from federated_peer import LR, Clock, arguments, build, data, examples_of, mark_run, report
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn
from torch.nn.functional import cross_entropy


class Rounds(TrainingProcessCallback):
    """Ticks at the end of each."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """See pfl."""
        self.clock.tick()
        return False, Metrics()


class Network(nn.Module):
    """With the two methods that pfl asks for."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def loss(self, x, y):
        """Mean cross-entropy."""
        return cross_entropy(self.layers(x), y)

    def metrics(self, x, y):
        """None: nothing is evaluated."""
        return {}


if __name__ == "__main__":
    model, clients, cohort, batch_size, rounds = arguments()
    mark_run()
    torch.set_num_threads(1)
    data(clients)
    clock = Clock()
    network = Network(build(model))
    users = FederatedDataset(
        lambda user: Dataset(raw_data=list(examples_of(user, clients))),
        get_user_sampler("random", list(range(clients))),
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=rounds + 2,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=users, val_data=None),
        model=PyTorchModel(network, torch.optim.SGD, torch.optim.SGD(network.parameters(), lr=1.0)),
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=batch_size),
        callbacks=[Rounds(clock)],
    )
    report("pfl", clock)
