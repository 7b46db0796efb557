"""PySyft's vocabulary on shares: share, get, refresh, encrypt, modules, and what is refused."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import engine  # noqa: F401  (one thread)
import tacit.syft as sy
from tacit.errors import InputError, PeerError, UnsupportedOperator

X = torch.tensor([[1.5, -2.25, 3.0], [0.125, 4.0, -0.5]])
Y = torch.tensor([[0.5, 0.5, -4.0], [0.125, -3.0, 2.0]])
WHOLE_NUMBERS = torch.tensor([[25, 3], [-4, 1]])


@pytest.fixture(autouse=True)
def hook() -> Iterator[sy.TorchHook]:
    hook = sy.TorchHook(torch)
    yield hook
    hook.unhook()


@pytest.fixture
def workers() -> tuple[sy.VirtualWorker, ...]:
    return tuple(sy.VirtualWorker(None, id=name) for name in ("alice", "bob", "james"))


@pytest.fixture
def kwargs(workers: tuple[sy.VirtualWorker, ...]) -> dict[str, object]:
    return {"workers": workers[:2], "crypto_provider": workers[2]}


def whole(workers: tuple[sy.VirtualWorker, ...], values: Tensor) -> Tensor:
    return values.share(*workers[:2], crypto_provider=workers[2])


def fixed(workers: tuple[sy.VirtualWorker, ...], values: Tensor, **options: object) -> Tensor:
    return values.fix_precision(precision_fractional=4).share(*workers[:2], crypto_provider=workers[2], **options)


class TestFixedPrecision:
    def test_it_holds_multiples_and_computes_like_a_tensor(self) -> None:
        one = torch.tensor([0.123, -0.5]).fix_prec(precision_fractional=2)
        assert one.child.tolist() == [12, -50]
        assert repr(one) == "(Wrapper)>FixedPrecisionTensor>tensor([ 12, -50])"
        assert one.abs().sum().float_prec().item() == pytest.approx(0.62)
        assert (one + one).float_precision().tolist() == pytest.approx([0.24, -1.0])
        assert (one > 0).tolist() == [True, False]
        assert one.copy().fix_precision().child.tolist() == [12, -50]

    def test_plain_tensors_are_floating_already(self) -> None:
        assert torch.tensor([3]).float_precision().dtype == torch.float32


WHOLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda x, y: x + y - x * 3 + 2,
    "products": lambda x, y: x * y,
    "matrix products": lambda x, y: x.mm(y) + x @ y,
    ">": lambda x, y: x > y,
    "<=": lambda x, y: x <= y,
    "==": lambda x, y: x == y + 20,
    "max": lambda x, y: x.max(),
    "max of rows": lambda x, y: x.max(dim=0)[0],
    "where it is": lambda x, y: x.max(dim=1)[1] + x.argmax(dim=0),
    "large numbers": lambda x, y: ((x * 20_000_000 - y * 10_000_000 == 470_000_000) + 3 * y) * 1_000_000,
    "a public tensor": lambda x, y: (x - torch.tensor([[100_000, 3], [2, 1]])) * torch.tensor([1, -20_000]),
    "counted": lambda x, y: x.eq(y).sum() + (x > 0).sum(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_numbers_are_exact(name: str, workers: tuple[sy.VirtualWorker, ...]) -> None:
    other = torch.tensor([[5, 3], [2, -19]])
    result = WHOLE[name](whole(workers, WHOLE_NUMBERS), whole(workers, other)).get()
    assert result.dtype == torch.int64
    assert torch.equal(result, WHOLE[name](WHOLE_NUMBERS, other).long())


@pytest.mark.parametrize("name", ["sum", "linear"])
def test_more_workers_or_no_provider_add_up(name: str, workers: tuple[sy.VirtualWorker, ...]) -> None:
    linear = {"sum": lambda x: x + x, "linear": lambda x: 3 * x - x.sum() + 1}[name]
    for holders in (workers, workers[:2]):
        assert torch.equal(linear(WHOLE_NUMBERS.share(*holders)).get(), linear(WHOLE_NUMBERS))
        torch.testing.assert_close(linear(X.fix_precision().share(*holders)).get().float_precision(), linear(X))
        torch.testing.assert_close(linear(X.fix_precision().share(*holders)).decrypt(), linear(X))


def test_the_workers_list_their_shares_until_they_are_put_together(workers: tuple[sy.VirtualWorker, ...]) -> None:
    for make in (lambda: WHOLE_NUMBERS.share(*workers), lambda: whole(workers, WHOLE_NUMBERS)):
        shared = make()
        shares = [list(worker._objects.values()) for worker in workers]
        assert sum(one for held in shares for one in held).equal(WHOLE_NUMBERS)
        assert not any(one.equal(WHOLE_NUMBERS) for held in shares for one in held)
        assert "25" not in repr(shared)
        shared.get()
        assert [worker._objects for worker in workers] == [{}, {}, {}]


class TestFloats:
    @pytest.mark.parametrize("protocol", ["snn", "fss"])
    def test_networks_pools_and_places(self, protocol: str, workers: tuple[sy.VirtualWorker, ...]) -> None:
        image, weight = torch.linspace(-2, 2, 72).view(1, 2, 6, 6), torch.linspace(-1, 1, 54).view(3, 2, 3, 3)
        run = lambda x, w: functional.max_pool2d(functional.conv2d(x, w, padding=1).relu(), 2).flatten(1)  # noqa: E731
        private = run(fixed(workers, image, protocol=protocol), fixed(workers, weight))
        torch.testing.assert_close(private.decrypt(), run(image, weight), atol=5e-3, rtol=0)
        places = fixed(workers, X, protocol=protocol).argmax(dim=1)
        assert places.decrypt().tolist() == X.argmax(dim=1).tolist()

    def test_refreshed_shares_are_new_and_autograd_goes_through(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        x = fixed(workers, X, requires_grad=True)
        again = x.refresh()
        assert not torch.equal(again.share_at(workers[0]), x.share_at(workers[0]))
        torch.testing.assert_close(again.get().float_precision(), X, atol=2e-4, rtol=0)
        ((again**2).sum().refresh() / 2).backward()
        torch.testing.assert_close(x.grad.get().float_precision(), X, atol=1e-3, rtol=0)

    def test_copies_are_apart(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        x = fixed(workers, X)
        twin = x.copy()
        x += 1
        torch.testing.assert_close(twin.get().float_precision(), X, atol=2e-4, rtol=0)

    def test_with_public_fixed_precision(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        result = fixed(workers, X) * Y.fix_precision() + Y.fix_precision()
        torch.testing.assert_close(result.get().float_precision(), X * Y + Y, atol=1e-3, rtol=0)

    def test_encrypt_and_decrypt(self, kwargs: dict[str, object]) -> None:
        private = X.encrypt(protocol="fss", precision_fractional=4, **kwargs)
        torch.testing.assert_close((private * private).decrypt(), X * X, atol=1e-3, rtol=0)


class TestFromWhereItIs:
    def test_secure_aggregation(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        alice, bob, james = workers
        shared = [
            value.send(worker).copy().fix_precision().share(bob, alice, crypto_provider=james).get()
            for value, worker in ((X, alice), (Y, bob))
        ]
        torch.testing.assert_close(sum(shared).get().float_precision() / 2, (X + Y) / 2, atol=1e-3, rtol=0)

    def test_a_module_and_data_are_encrypted_where_they_live(
        self, workers: tuple[sy.VirtualWorker, ...], kwargs: dict[str, object]
    ) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
        nn.init.uniform_(model[1].running_var, 0.5, 2)
        image = torch.randn(3, 1, 4, 4)
        expected = model(image)
        data = image.send(workers[0]).encrypt(**kwargs).get()
        private = model.send(workers[1]).encrypt(**kwargs).get()
        assert not any(value.requires_grad for value in private.parameters())
        torch.testing.assert_close(private(data).decrypt(), expected.detach(), atol=5e-3, rtol=0)


class TestModules:
    def test_in_place_and_back(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        plain = copy.deepcopy(model)
        assert model.fix_precision().share(*workers[:2], crypto_provider=workers[2]) is model
        torch.testing.assert_close(model(fixed(workers, X)).get().float_prec(), plain(X).detach(), atol=2e-3, rtol=0)
        assert "-> alice\n\t-> bob\n\t*crypto provider: james*" in repr(model[0].weight)
        assert repr(model[0].weight).startswith("Parameter>")
        model.get().float_precision()
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-6, rtol=0)
        assert isinstance(model[0].weight, nn.Parameter)

    def test_training_on_shares_is_training_in_the_clear(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
        private = (
            copy.deepcopy(plain).fix_precision().share(*workers[:2], crypto_provider=workers[2], requires_grad=True)
        )
        for model, inputs, targets in ((plain, X, Y), (private, fixed(workers, X), fixed(workers, Y))):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05).fix_precision()
            for _ in range(3):
                optimizer.zero_grad()
                loss = ((model(inputs) - targets) ** 2).sum()
                (loss.refresh() if model is private else loss).div(2).backward()
                optimizer.step()
        torch.testing.assert_close(private.get().state_dict(), plain.state_dict(), atol=2e-3, rtol=0)


class TestRefusals:
    def test_floats_without_fix_precision(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        for value in (X, nn.Linear(2, 2)):
            with pytest.raises(InputError, match=r"fix_precision\(\)\.share"):
                value.share(*workers[:2], crypto_provider=workers[2])

    def test_a_missing_crypto_provider(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        x = X.fix_precision().share(*workers[:2])
        for call in (lambda: x * x, lambda: x > 0, lambda: x.relu()):
            with pytest.raises(UnsupportedOperator, match="crypto provider"):
                call()
        with pytest.raises(InputError, match="crypto_provider=james"):
            nn.Linear(2, 2).fix_precision().share(*workers[:2])

    def test_more_than_two_workers_multiply(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        carol = sy.VirtualWorker(None, id="carol")
        x = WHOLE_NUMBERS.share(*workers[:2], carol, crypto_provider=workers[2])
        with pytest.raises(UnsupportedOperator, match="two parties"):
            _ = x * x

    def test_an_operation_that_the_engine_lacks(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        with pytest.raises(UnsupportedOperator, match=r"aten\.tan.*test_syft_encrypted.py"):
            fixed(workers, X).tan()

    def test_workers_that_do_not_go_together(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        others = tuple(sy.VirtualWorker(None, id=name) for name in ("carol", "dave", "erin"))
        with pytest.raises(InputError, match="shared among different parties"):
            _ = fixed(workers, X) + fixed(others, X)
        with pytest.raises(InputError, match="another at"):
            _ = X.send(workers[0]) + fixed(workers, X)
        for pair in ((workers[0], workers[0]), (workers[0], workers[2])):
            with pytest.raises(InputError, match="neither of them"):
                WHOLE_NUMBERS.share(*pair, crypto_provider=workers[2])
        with pytest.raises(InputError, match="one engine"):
            fixed(workers, X, protocol="paillier")

    def test_the_same_workers_in_any_order_go_together(self, workers: tuple[sy.VirtualWorker, ...]) -> None:
        swapped = (workers[1], workers[0], workers[2])
        torch.testing.assert_close((fixed(workers, X) + fixed(swapped, X)).decrypt(), 2 * X, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("gone", [0, 2])
    def test_a_worker_that_is_gone(self, gone: int, workers: tuple[sy.VirtualWorker, ...]) -> None:
        x = fixed(workers, X)
        workers[gone].close()
        with pytest.raises(PeerError, match="is gone"):
            fixed(workers, X)
        with pytest.raises(PeerError, match="is gone"):
            _ = x * x
