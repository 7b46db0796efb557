"""Encrypted training with CrypTen: a step of SGD on cross-entropy, as two parties and a trusted third party.

Images, one-hot labels, weights and gradients are shared. A step is forward, backward and update; its loss stays shared.
"""

import crypten_peer
import figures
import torch
from crypten_peer import crypten
from torch.nn.functional import cross_entropy


def run(name: str, batch: int, repeat: int) -> dict:
    """One party's program."""
    plain, x = crypten_peer.prepared(name, batch)
    labels = torch.arange(batch) % figures.CLASSES
    model = crypten_peer.converted(plain)
    model.train()
    model.encrypt(src=0)
    images = crypten.cryptensor(x, src=1)
    targets = crypten.cryptensor(torch.nn.functional.one_hot(labels, figures.CLASSES).float(), src=1)
    criterion = crypten.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(plain.parameters(), lr=figures.LEARNING_RATE)

    def step() -> None:
        model.zero_grad()
        criterion(model(images), targets).backward()
        model.update_parameters(figures.LEARNING_RATE)

    def plaintext_step() -> None:
        optimizer.zero_grad()
        cross_entropy(plain(x), labels).backward()
        optimizer.step()

    # Compared after one step: errors of CrypTen's truncation would grow with every further one.
    step()
    plaintext_step()
    model.decrypt()
    own = [parameter.detach() for layer in model.modules() for parameter in layer.parameters(recurse=False)]
    error = max((a - b.detach()).abs().max().item() for a, b in zip(own, plain.parameters(), strict=True))
    model.encrypt(src=0)
    times, _ = crypten_peer.measured(step, repeat)
    return times | {"error": error}


if __name__ == "__main__":
    crypten_peer.report(run, "max_abs_error_weights")
