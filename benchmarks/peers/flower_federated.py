"""Federated averaging in Flower's simulator: `flower_federated.py 2nn|cnn CLIENTS COHORT BATCH_SIZE ROUNDS`.

Ray gets one CPU an actor, its default; dashboard and telemetry are off. The clients' examples are made once in each
actor.
"""

import os
import sys
from pathlib import Path

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
# Ray's workers import this module and its neighbour by name, so that they keep the examples.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)

import torch
from federated_peer import EXAMPLES_PER_CLIENT, LR, Clock, arguments, build, examples_of, mark_run, report
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch.nn.functional import cross_entropy

MODEL, CLIENTS, COHORT, BATCH_SIZE, ROUNDS = arguments() if len(sys.argv) == 6 else ("2nn", 0, 0, 0, 0)
client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch of SGD at one client."""
    torch.set_num_threads(1)
    config = message.content["config"]
    network = build(str(config["model"]))
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, targets = examples_of(int(context.node_config["partition-id"]), int(config["clients"]))
    optimizer = torch.optim.SGD(network.parameters(), lr=LR)
    for batch in torch.empty(EXAMPLES_PER_CLIENT).uniform_().argsort().split(int(config["batch-size"])):
        optimizer.zero_grad()
        loss = cross_entropy(network(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": EXAMPLES_PER_CLIENT})
    reply = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content=reply, reply_to=message)


class Timed(FedAvg):
    """Ticks when a round's updates have become one."""

    def __init__(self, clock: Clock, **options: object) -> None:
        super().__init__(**options)
        self.clock = clock

    def aggregate_train(self, server_round, replies):
        """See Flower."""
        result = super().aggregate_train(server_round, replies)
        self.clock.tick()
        return result


def main() -> None:
    """Run the simulator."""
    from flwr.app import ConfigRecord  # noqa: PLC0415

    mark_run()
    clock = Clock()
    server_app = ServerApp()

    @server_app.main()
    def serve(grid: Grid, context: Context) -> None:
        strategy = Timed(clock, fraction_train=COHORT / CLIENTS, fraction_evaluate=0.0, min_available_nodes=CLIENTS)
        config = ConfigRecord({"model": MODEL, "clients": CLIENTS, "batch-size": BATCH_SIZE})
        initial = ArrayRecord(build(MODEL).state_dict())
        strategy.start(grid=grid, initial_arrays=initial, train_config=config, num_rounds=ROUNDS + 1)

    import flower_federated  # noqa: PLC0415

    run_simulation(
        server_app,
        flower_federated.client_app,
        num_supernodes=CLIENTS,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )
    report("flower", clock)


if __name__ == "__main__":
    main()
