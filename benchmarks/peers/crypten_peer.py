"""The networks in CrypTen's layers, and what its scripts measure with: tuples fetched before, or asked for in between.

CrypTen 0.4.1 was written for PyTorch of 2022 and does not import under a current one, because its ONNX converter asks
for a module that is gone. The networks here are built from CrypTen's own layers and need no converter, so an empty
module stands in for the missing one: CrypTen and tacit then run on the same PyTorch.
"""

import math
import statistics
import sys
import types
from collections.abc import Callable

import torch

registration = types.ModuleType("torch.onnx._internal.registration")
registration.registry = None
sys.modules[registration.__name__] = registration

import crypten  # noqa: E402
import crypten.communicator  # noqa: E402
import crypten.mpc  # noqa: E402
import crypten.nn  # noqa: E402
import figures  # noqa: E402
from crypten.config import cfg  # noqa: E402
from torch import nn  # noqa: E402

LAYERS = {
    "mlp": lambda: [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)],
    "lenet": lambda: [
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(50 * 4 * 4, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    ],
}


def prepared(name: str, batch: int) -> tuple[nn.Sequential, torch.Tensor]:
    """The plaintext network with PyTorch's initial weights, and a batch in [0, 1); the same at both parties."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (batch, *figures.ITEM_SHAPE[name])
    return nn.Sequential(*LAYERS[name]()), torch.arange(math.prod(shape)).reshape(shape) % 97 / 97


def converted(model: nn.Sequential) -> crypten.nn.Sequential:
    """The network in CrypTen's layers, with its weights."""
    layers = []
    for layer in model:
        match layer:
            case nn.Conv2d():
                own = crypten.nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
            case nn.Linear():
                own = crypten.nn.Linear(layer.in_features, layer.out_features)
            case nn.MaxPool2d():
                own = crypten.nn.MaxPool2d(layer.kernel_size, stride=layer.stride)
            case nn.Flatten():
                own = crypten.nn.Flatten(axis=1)
            case nn.ReLU():
                own = crypten.nn.ReLU()
        for name, value in layer.named_parameters():
            own.set_parameter(name, value.detach().clone())
        layers.append(own)
    return crypten.nn.Sequential(*layers)


def measured(work: Callable[[], object], repeat: int) -> tuple[dict, object]:
    """One party's times of ``work()``, and its last result.

    After a run that warms up come ``repeat`` in CrypTen's default use (*all in*), in which the third party is asked in
    between, one that notes which tuples are asked for, and ``repeat`` on tuples that were fetched before (*online*).
    """
    provider, communicator = crypten.mpc.get_default_provider(), crypten.communicator.get()
    work()
    all_in, online = [], []
    for _ in range(repeat):
        communicator.barrier()
        all_in.append(figures.timed(work)[0])
    provider.trace(True)
    work()
    provider.trace(False)
    for _ in range(repeat):
        provider.fill_cache()
        communicator.barrier()
        communicator.reset_communication_stats()
        seconds, result = figures.timed(work)
        online.append(seconds)
    rounds, sent = communicator.comm_rounds, communicator.comm_bytes
    return {"online": online, "all_in": all_in, "rounds": rounds, "bytes": sent}, result


def report(run: Callable[..., list | None], error_name: str) -> None:
    """Run one party's program in two processes beside a trusted third party, and print the figures."""
    name, batch, repeat = figures.arguments()
    cfg.communicator.verbose = True
    cfg.mpc.provider = "TTP"
    results = crypten.mpc.run_multiprocess(world_size=2)(run)(name, batch, repeat)
    if not results:
        sys.exit("CrypTen's processes failed: see above")
    first = results[0]
    figures.report(
        "crypten",
        name,
        batch,
        first["online"],
        all_in_s=statistics.median(first["all_in"]),
        bytes_online_per_party=first["bytes"],
        rounds=first["rounds"],
        versions={"crypten": "0.4.1", "torch": torch.__version__},
        **{error_name: first["error"]},
    )
