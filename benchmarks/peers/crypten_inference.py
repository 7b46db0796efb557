"""Encrypted inference with CrypTen: two parties and a trusted third party, as processes on this machine.

*Online* is a forward pass on tuples that were fetched before (CrypTen's tuple cache); *all in* is its default use, in
which the third party is asked in between. CrypTen 0.4.1 was written for PyTorch of 2022 and does not import under a
current one, because its ONNX converter asks for a module that is gone. The networks here are built from CrypTen's own
layers and need no converter, so an empty module stands in for the missing one: CrypTen and tacit then run on the same
PyTorch.
"""

import math
import statistics
import sys
import types

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


@crypten.mpc.run_multiprocess(world_size=2)
def run(name: str, batch: int, repeat: int) -> dict:
    """One party's program."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.Sequential(*LAYERS[name]()).eval()
    x = torch.arange(batch * math.prod(figures.ITEM_SHAPE[name])).reshape(batch, *figures.ITEM_SHAPE[name]) % 97 / 97
    model = converted(plain)
    model.eval()
    model.encrypt(src=0)
    shared = crypten.cryptensor(x, src=1)
    provider = crypten.mpc.get_default_provider()
    communicator = crypten.communicator.get()
    model(shared)
    all_in, online = [], []
    for _ in range(repeat):
        communicator.barrier()
        all_in.append(figures.timed(lambda: model(shared))[0])
    for number in range(repeat):
        provider.trace(True)
        if not number:
            model(shared)
        provider.trace(False)
        provider.fill_cache()
        communicator.barrier()
        communicator.reset_communication_stats()
        seconds, result = figures.timed(lambda: model(shared))
        online.append(seconds)
    stats = (communicator.comm_rounds, communicator.comm_bytes)
    error = (result.get_plain_text() - plain(x)).abs().max().item()
    return {"online": online, "all_in": all_in, "rounds": stats[0], "bytes": stats[1], "error": error}


if __name__ == "__main__":
    name, batch, repeat = figures.arguments()
    cfg.communicator.verbose = True
    cfg.mpc.provider = "TTP"
    results = run(name, batch, repeat)
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
        max_abs_error=first["error"],
        versions={"crypten": "0.4.1", "torch": torch.__version__},
    )
