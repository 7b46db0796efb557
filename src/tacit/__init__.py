"""tacit: federated learning and encrypted inference for PyTorch.

Train one model over data that never leaves its owners, then serve it so that neither the question nor the model is ever
seen in the clear.

>>> run = tacit.federate(model, clients, algorithm=tacit.FedAvg(lr=0.1), rounds=50, cohort=10)
>>> with tacit.cluster() as parties:
...     private = parties.encrypt(run.model, example)
...     logits = private(images)
"""

from tacit.cluster import Cluster, PrivateModel, cluster
from tacit.data.examples import Examples
from tacit.errors import TacitError
from tacit.federated.distributed_dp import DistributedDP
from tacit.federated.fedavg import FedAvg
from tacit.federated.privacy import CentralDP, RecordDP
from tacit.party.connection import connect
from tacit.runtimes.simulation import FederatedRun, SumSettings, federate
from tacit.tensor import PrivateTensor, share_module, tensor

__version__ = "0.1.0"
__all__ = [
    "CentralDP",
    "Cluster",
    "DistributedDP",
    "Examples",
    "FedAvg",
    "FederatedRun",
    "PrivateModel",
    "PrivateTensor",
    "RecordDP",
    "SumSettings",
    "TacitError",
    "cluster",
    "connect",
    "federate",
    "share_module",
    "tensor",
]
