"""Networks, the choice of pooling, `tacit cost` and the audit."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tacit
from tacit.errors import InputError
from tacit.federated.models import lenet
from tacit.program.lowering import Context
from tacit.program.network import NETWORKS, Network, parse_network
from tacit.ring.prg import Prg


def encrypted(model: nn.Module, shape: tuple[int, ...], network: Network | None = None) -> tacit.PrivateModel:
    return tacit.cluster(Prg(bytes(16))).encrypt(model.eval(), torch.zeros(shape), context=Context(network=network))


def test_networks_are_parsed():
    assert parse_network("lan") == NETWORKS["lan"]
    assert parse_network("20,50") == Network(0.020, 50e6)
    assert Network(0.040, 100e6).seconds(rounds=10, bytes_online=1_000_000) == pytest.approx(0.2 + 0.08)


@pytest.mark.parametrize("text", ["", "fast", "20", "20,50,1", "-1,50", "20,0", "nan,1"])
def test_other_networks_are_refused(text):
    with pytest.raises(InputError, match=r"[nN]etwork"):
        parse_network(text)


def test_the_network_decides_between_rounds_and_bytes():
    small, slow, thin = (encrypted(lenet(), (1, 1, 28, 28), n) for n in (None, Network(0.04, 1e8), Network(0, 1e6)))
    assert small.cost().rounds == thin.cost().rounds == 25
    assert slow.cost().rounds <= 16
    assert slow.cost().bytes_online > small.cost().bytes_online
    assert slow.cost().estimate(NETWORKS["wan"]) < small.cost().estimate(NETWORKS["wan"])


def test_the_low_round_plan_computes_the_same_and_costs_what_it_says():
    model = lenet().eval()
    private = encrypted(model, (3, 1, 28, 28), NETWORKS["wan"])
    x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert float((private(x) - model(x)).detach().abs().max()) < 2.0**-9
    assert private.counted() == private.cost()


def test_an_estimate_counts_computing_too():
    cost = encrypted(lenet(), (1, 1, 28, 28)).cost()
    instant = Network(0, float("inf"))
    assert 0 < cost.estimate(instant) < cost.estimate(NETWORKS["lan"]) < cost.estimate(NETWORKS["wan"])
    convolutions = [layer.multiplications for layer in cost.layers if "convolution" in layer.operator]
    assert convolutions == [24 * 24 * 20 * 25, 8 * 8 * 50 * 500]


class TestAudit:
    def test_a_sample_inside_the_range(self):
        torch.manual_seed(0)
        audit = encrypted(lenet(), (1, 1, 28, 28)).audit(torch.rand(4, 1, 28, 28))
        assert audit.within
        assert 0 < audit.error < 2.0**-9
        assert {layer.operator for layer in audit.layers} >= {"aten.convolution.default", "tacit.max_pool2d_relu"}

    @pytest.mark.parametrize(
        ("model", "named"),
        [
            (nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "aten.relu.default"),
            (nn.Sequential(nn.Linear(1, 1), nn.Unflatten(1, (1, 1, 1)), nn.ReLU(), nn.MaxPool2d(1)), "max_pool2d"),
        ],
    )
    def test_a_value_outside_the_window_is_found(self, model, named):
        with torch.no_grad():
            model[0].weight.fill_(30.0)
            model[0].bias.zero_()
        private = encrypted(model, (1, 1))
        assert private.audit(torch.full((1, 1), 500.0)).within
        audit = private.audit(torch.full((1, 1), 600.0))
        assert not audit.within
        assert [named in layer.operator for layer in audit.layers if not layer.within] == [True]
        assert "OUT OF RANGE" in str(audit)

    def test_it_leaves_the_parties_alone(self):
        parties = tacit.cluster(Prg(bytes(16)))
        private = parties.encrypt(nn.Linear(2, 2), torch.zeros(1, 2))
        before = repr(parties.provider)
        private.audit(torch.ones(1, 2))
        assert repr(parties.provider) == before


class TestCommand:
    def tacit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "tacit"), "cost", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def test_a_model_of_one_s_own(self, tmp_path):
        file = tmp_path / "net.py"
        file.write_text("from torch import nn\ndef small():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n")
        done = self.tacit(f"{file}:small", "--item", "4", "--batch", "2", "--network", "20,50")
        assert done.returncode == 0, done.stderr
        assert "addmm" in done.stdout
        assert "relu" in done.stdout
        assert "in all" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["nothing"], "nothing"),
            (["lenet", "--network", "fast"], "fast"),
            (["lenet", "--batch", "0"], "batch"),
            (["/nonexistent.py:model"], "/nonexistent.py"),
        ],
    )
    def test_a_mistake_is_one_line_and_exit_code_two(self, arguments, named):
        done = self.tacit(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert named in done.stderr
