"""Federated SGD: one gradient a client and round.

McMahan et al. 2017, *Communication-Efficient Learning of Deep Networks from Decentralized Data*, section 2; the
large-batch synchronous SGD of Chen et al. 2016.
"""

from __future__ import annotations

from tacit.federated.fedavg import FedAvg


def fed_sgd(lr: float = 0.1) -> FedAvg:
    """Each client of the cohort takes the gradient g_k over all n_k of its examples, the server one step::

        w ← w − η Σ_k (n_k / n) g_k

    That is `FedAvg` with all the examples in one batch and one epoch: the client makes the step of size η, and the
    mean of the differences is the server's. Use it as the baseline that local training has to beat: every round
    costs as many bytes and makes a single step.

    Args:
        lr: η.

    Raises:
        InputError: ``lr`` is not positive.
    """
    return FedAvg(lr=lr, batch_size=None, epochs=1)
