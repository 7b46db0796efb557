"""Training in real processes of what people train: norms and dropout, checkpoints that each party writes for itself."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import prg
from tacit.cluster import Cluster
from tacit.errors import InputError
from tacit.party.launch import LocalProcesses
from tacit.party.trainer import ProcessTrainer
from tacit.program.lowering import Context
from tacit.program.optimizers import Sgd

LR = 0.1
BOUND = 2.0**-11


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)


def in_the_clear(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    inputs, labels = batch(seed)
    optimizer.zero_grad()
    loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a.is_floating_point())


def test_training_goes_on_from_what_each_party_wrote(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6), nn.LayerNorm(6))
    model.append(nn.Dropout(0.0)).append(nn.Linear(6, 3))
    settings, plain = Sgd(LR, momentum=0.5), copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR, momentum=0.5)
    with LocalProcesses() as processes:
        trainer = ProcessTrainer(processes, model, optimizer=settings)
        with pytest.raises(InputError, match="hold nothing yet"):
            trainer.save(tmp_path)
        trainer.step(*batch(0))
        in_the_clear(plain, optimizer, 0)
        trainer.save(tmp_path)
        saved = trainer.reveal()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alice.safetensors", "bob.safetensors"]
    assert distance(saved, plain) < 2 * LR * BOUND
    # Other processes, which have never seen the model, and other weights to begin with.
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.ones_(parameter)
    expected = in_the_clear(plain, optimizer, 1)
    with LocalProcesses() as processes:
        resumed = ProcessTrainer(processes, other, optimizer=settings)
        resumed.load(tmp_path, (8, 6))
        assert resumed.steps == 1
        assert distance(resumed.reveal(), saved) == 0
        resumed.step(*batch(1))
        assert resumed.loss() == pytest.approx(expected, abs=2.0**-10)
        assert distance(resumed.reveal(), plain) < 4 * LR * BOUND
        # The same processes go on with a model that takes private positions in a table and drops by a public seed.
        tokens = nn.Sequential(nn.Embedding(5, 200), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 3, bias=False))
        nn.init.constant_(tokens[0].weight, 2.0**-5)
        nn.init.constant_(tokens[3].weight, 2.0**-5)
        dropped = ProcessTrainer(processes, tokens, lambda output, labels: (output * labels).sum(), Sgd(2.0**-6))
        dropped.step(torch.tensor([[3, 0]]), torch.tensor([0]))
        # An output is a sum of 2^-10·2 over what was kept, of which the labels take one.
        count = dropped.loss() * 2**9
        assert count == pytest.approx(round(count), abs=2.0**-4)
        assert 140 < count < 260
        moved = (dropped.reveal()[0].weight - tokens[0].weight).detach()
        assert moved.abs().sum(1).nonzero().flatten().tolist() == [0, 3]
        assert int((moved != 0).sum()) == round(count)
    # The same files, in one process.
    trio = Cluster(prg()).trainer(other, optimizer=settings)
    trio.load(tmp_path)
    assert distance(trio.reveal(), saved) == 0
    assert trio.step(*batch(1)).reveal() == pytest.approx(expected, abs=2.0**-10)


@pytest.mark.parametrize("context", [Context(exact=True), Context(windows={"relu": 3}), Context(finer={"relu": 1})])
def test_what_training_has_not_is_refused_with_the_reason(context: Context) -> None:
    reason = "rounding down would drop them" if context.exact else "weights that do not change"
    with pytest.raises(InputError, match=reason):
        ProcessTrainer(LocalProcesses(), nn.Linear(2, 2), context=context)
    with pytest.raises(InputError, match=reason):
        Cluster(prg()).trainer(nn.Linear(2, 2), context=context)
