"""A plain ServerApp, for `flwr run`; flower_rounds.py starts the same strategy itself, to look at its clock."""

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedavg_mnist.client import two_nn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Twenty rounds."""
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0)
    initial = ArrayRecord(two_nn().state_dict())
    strategy.start(
        grid=grid, initial_arrays=initial, num_rounds=20, train_config=ConfigRecord({"lr": 0.05, "batch-size": 10})
    )
