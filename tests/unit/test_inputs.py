"""Models of several inputs, and what a client may give: taken as it is meant, or refused before anything is used."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import Recorder, prg
from tacit.cluster import Cluster
from tacit.errors import InputError, RangeError


class Two(nn.Module):
    """A table and a layer: whole numbers and real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(7, 4), nn.Linear(3, 4)

    def forward(self, words: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = self.table(words) * self.layer(numbers)
        return both.relu(), both.sum(1)


@pytest.fixture
def parties() -> Cluster:
    return Cluster(prg())


def example(count: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 7, (count,), generator=generator), torch.randn(count, 3, generator=generator)


class TestSeveral:
    def test_they_are_shared_each_for_itself(self, parties: Cluster) -> None:
        torch.manual_seed(0)
        model, given = Two(), []
        private = parties.encrypt(model, example())
        for count in (2, 5):
            inputs = example(count)
            got = private(*inputs, seen=lambda *pair: given.append(pair))
            for one, other in zip(got, model(*inputs), strict=True):
                torch.testing.assert_close(one, other.detach(), atol=2.0**-13, rtol=0)
            assert private.counted() == private.cost((count,), (count, 3))
        assert [tuple(alice.shape) for alice, _ in given] == [(2,), (2, 3), (5,), (5, 3)]
        assert repr(private) == "PrivateModel(Two, input (), (3,), shared by alice and bob)"

    def test_dealing_ahead_auditing_and_calibrating(self, parties: Cluster) -> None:
        torch.manual_seed(0)
        model = Two()
        private = parties.encrypt(model, example())
        private.deal((2,), (2, 3))
        private.deal()
        for _ in range(3):
            assert (private(*example())[0] - model(*example())[0]).abs().max() < 2.0**-13
        assert private.audit(*example(5)).within
        context = private.calibrate(*example(5)).context(model)
        calibrated = parties.encrypt(model, example(), context=context)
        assert (calibrated(*example(3))[0] - model(*example(3))[0]).abs().max() < 2.0**-13

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ((torch.zeros(2, dtype=torch.long),), "for 2 inputs: 1 were given"),
            ((torch.zeros(2, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2)), "for 2 inputs: 3 were given"),
            ((torch.zeros(2), torch.zeros(2, 3)), "encrypted for whole numbers"),
            ((torch.zeros(2, dtype=torch.long), torch.zeros(2, 4)), r"the model takes \(n, 3\)"),
            ((torch.zeros(3, dtype=torch.long), torch.zeros(2, 3)), "cannot be traced"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, inputs: tuple[Tensor, ...], message: str, parties: Cluster) -> None:
        private = parties.encrypt(Two(), example())
        before = repr(parties.provider)
        with pytest.raises(InputError, match=message):
            private(*inputs)
        assert repr(parties.provider) == before


LAYER = nn.Linear(3, 2)
IMAGE = torch.linspace(-2, 2, 12).view(4, 3)


class TestBad:
    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            (torch.tensor([[0.0, torch.nan, 0.0]]), RangeError, "NaN or infinity"),
            (torch.tensor([[0.0, -torch.inf, 0.0]]), RangeError, "NaN or infinity"),
            (torch.tensor([[0.0, 16384.0, 0.0]]), RangeError, "outside"),
            (torch.tensor([[0, 20000, 0]]), RangeError, "outside"),
            (torch.tensor([[0.0, 65504.0, 0.0]]).half(), RangeError, "outside"),
            (torch.zeros(0, 3), InputError, "empty batch"),
            (torch.zeros(3), InputError, "has shape"),
            (torch.zeros(1, 4), InputError, "has shape"),
            (torch.tensor(1.0), InputError, "has shape"),
            (torch.zeros(1, 3, dtype=torch.complex64), InputError, "complex64"),
            (torch.zeros(1, 3, dtype=torch.bool), InputError, "bool"),
            ([[0.0, 0.0, 0.0]], InputError, "is a list"),
        ],
    )
    def test_it_is_refused_and_nothing_is_used_up(
        self, inputs: Any, error: type[Exception], message: str, parties: Cluster
    ) -> None:
        private = parties.encrypt(LAYER, IMAGE[:1])
        private.deal((1, 3))
        tap = Recorder()
        parties._trio.tap, before = tap, repr(parties.provider)
        with pytest.raises(error, match=message) as caught:
            private(inputs)
        assert "\n" not in str(caught.value)
        assert repr(parties.provider) == before
        assert tap.labels == []
        # What was dealt is still there for the next call.
        assert (private(IMAGE[:1]) - LAYER(IMAGE[:1])).abs().max() < 2.0**-13
        assert repr(parties.provider) == before

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16, torch.uint8])
    def test_other_real_dtypes_are_taken(self, dtype: torch.dtype, parties: Cluster) -> None:
        inputs = (IMAGE.abs() * 4).to(dtype)
        got = parties.encrypt(LAYER, IMAGE)(inputs)
        assert (got - LAYER(inputs.float())).abs().max() < 2.0**-13

    @pytest.mark.parametrize(
        "view", [lambda x: x.T.contiguous().T, lambda x: x.flip(0)[::2], lambda x: x[:1].expand(4, 3)]
    )
    def test_views_are_taken_as_what_they_show(self, view: Any, parties: Cluster) -> None:
        shown = view(IMAGE)
        private = parties.encrypt(LAYER, IMAGE)
        assert (private(shown) - LAYER(shown)).abs().max() < 2.0**-13

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_models_of_other_precision_are_taken(self, dtype: torch.dtype, parties: Cluster) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
        got = parties.encrypt(model, IMAGE)(IMAGE)
        assert (got.double() - model.double()(IMAGE.double())).abs().max() < 2.0**-12

    def test_weights_that_are_complex_are_refused(self, parties: Cluster) -> None:
        with pytest.raises(InputError, match="complex"):
            parties.encrypt(nn.Linear(3, 2, dtype=torch.complex64), IMAGE)

    def test_another_shape_is_planned_when_it_comes(self, parties: Cluster) -> None:
        private = parties.encrypt(LAYER, IMAGE[:1])
        private.deal((1, 3))
        before = repr(parties.provider)
        assert (private(IMAGE) - LAYER(IMAGE)).abs().max() < 2.0**-13
        assert private.counted() == private.cost((4, 3))
        dealt = repr(parties.provider)
        assert dealt != before
        private(IMAGE[:1])
        assert repr(parties.provider) == dealt

    def test_a_model_that_changes_later_does_not_change_what_was_shared(self, parties: Cluster) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        private, trainer = parties.encrypt(model, IMAGE), parties.trainer(model, nn.functional.mse_loss, lr=0.5)
        expected = model(IMAGE).detach()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1.0)
        for count in (4, 2):
            assert (private(IMAGE[:count]) - expected[:count]).abs().max() < 2.0**-12
        assert (trainer.reveal()(IMAGE) - expected).abs().max() < 2.0**-12
        assert trainer.step(IMAGE, expected).reveal() < 2.0**-20

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32])
    def test_training_takes_other_real_dtypes_and_views(self, dtype: torch.dtype, parties: Cluster) -> None:
        inputs = IMAGE.round().T.contiguous().T.to(dtype)
        losses = [
            parties.trainer(LAYER, lr=0.5).step(one, torch.tensor([0, 1, 1, 0])).reveal()
            for one in (inputs, IMAGE.round())
        ]
        assert losses[0] == pytest.approx(losses[1], abs=2.0**-10)
