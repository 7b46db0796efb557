"""Between real processes over a real SuperLink the global model is the simulator's."""

import pytest
from torch import nn

from processes import CLEAR, MASKED, coordinated, everybody, largest_difference, write
from tacit.federated.fedavg import FedAvg
from tacit.federated.secure_sum.client import Policy
from tacit.federated.secure_sum.masked import MaskedSum
from tacit.federated.secure_sum.mean import SecureMean
from tacit.runtimes.simulation import federate
from tacit.sites.launch import processes

ROUNDS = 3


@pytest.mark.slow
def test_over_flower_the_global_weights_are_the_simulators(tmp_path):
    federation, examples = write(tmp_path / "all")
    found = {}
    with processes(federation):
        for text in (CLEAR, MASKED):
            with coordinated(federation, text) as over:
                everybody(over)
                records = [over.advance() for _ in range(ROUNDS)]
                assert [record.cohort for record in records] == [(0, 1, 2, 3)] * ROUNDS
                found[text] = over.model().state_dict()
    for text, secure in ((CLEAR, None), (MASKED, SecureMean(MaskedSum.among(4, Policy(3))))):
        network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        simulated = federate(
            network,
            examples,
            algorithm=FedAvg(lr=0.3, batch_size=8),
            rounds=ROUNDS,
            cohort=4,
            seed=3,
            secure_sum=secure,
        )
        assert largest_difference(found[text], simulated.model.state_dict()) <= 1e-6
