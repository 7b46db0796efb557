"""A plain ClientApp: one epoch of SGD in PyTorch."""

from functools import cache

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

app = ClientApp()


def two_nn() -> nn.Sequential:
    """784–200–200–10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


@cache
def examples(path: str) -> tuple[Tensor, Tensor]:
    """This node's images and labels."""
    return torch.from_numpy(np.load(f"{path}.x.npy")), torch.from_numpy(np.load(f"{path}.y.npy"))


@app.train()
def train(message: Message, context: Context) -> Message:
    """One epoch."""
    torch.set_num_threads(1)
    config = message.content["config"]
    network = two_nn()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    inputs, targets = examples(str(context.node_config["data"]))
    optimizer = torch.optim.SGD(network.parameters(), lr=float(config["lr"]))
    for batch in torch.empty(len(inputs)).uniform_().argsort().split(int(config["batch-size"])):
        optimizer.zero_grad()
        loss = cross_entropy(network(inputs[batch]), targets[batch])
        loss.backward()
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(inputs)})
    reply = RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content=reply, reply_to=message)
