"""The vocabulary of private tensors: fix_prec, share, operators, get, float_prec."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tacit
from engine import prg
from tacit.cluster import Cluster
from tacit.errors import InputError, RangeError, UnsupportedOperator
from tacit.tensor import PrivateTensor

X = torch.tensor([[1.5, -2.25, 3.0], [0.125, 4.0, -0.5]])
Y = torch.tensor([[0.5, 0.5, -4.0], [0.125, -3.0, 2.0]])
PLAIN = torch.tensor([2.0, -1.5, 0.25])


@pytest.fixture
def parties() -> Cluster:
    return Cluster(prg())


@pytest.fixture
def private(parties: Cluster) -> Callable[[Tensor], PrivateTensor]:
    """Shares a tensor, rounded to three digits, in the test's cluster."""
    return lambda values: shared_in(parties, values)


def shared_in(parties: Cluster, values: Tensor) -> PrivateTensor:
    return tacit.tensor(values).fix_prec().share(parties.alice, parties.bob, crypto_provider=parties.provider)


def close(result: object, expected: Tensor, digits: int = 3) -> None:
    """The result is private, and what it holds is what is expected to the last digit or one unit of 2^-16 more."""
    assert isinstance(result, PrivateTensor)
    got = result.get().float_prec()
    torch.testing.assert_close(got, expected.detach().float(), atol=0.5 * 10**-digits + 2**-13, rtol=0)


class TestFixedPrecision:
    def test_0_123_at_two_digits_holds_12(self) -> None:
        fixed = tacit.tensor([0.123]).fix_prec(precision=2, base=10)
        assert fixed.units.tolist() == [12]
        assert fixed.float_prec().tolist() == pytest.approx([0.12])

    def test_the_default_keeps_three_digits(self) -> None:
        assert tacit.tensor([0.1234, -2.0]).fix_prec().units.tolist() == [123, -2000]

    def test_other_bases(self) -> None:
        assert tacit.tensor([0.3]).fix_prec(precision=4, base=2).float_prec().tolist() == [0.3125]

    def test_both_names_give_the_numbers_back(self) -> None:
        fixed = tacit.tensor([1.5]).fix_prec()
        assert torch.equal(fixed.float_prec(), fixed.float_precision())
        assert fixed.float_prec().dtype == torch.float32

    def test_it_prints_what_it_holds(self) -> None:
        assert repr(tacit.tensor([0.123]).fix_prec(2)) == "FixedPrecisionTensor([12], precision=2, base=10)"

    @pytest.mark.parametrize(("precision", "base"), [(-1, 10), (3, 1), (3, 0), (3, -10)])
    def test_a_precision_that_makes_no_sense_is_refused(self, precision: int, base: int) -> None:
        with pytest.raises(InputError, match="precision"):
            tacit.tensor([1.0]).fix_prec(precision=precision, base=base)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e17])
    def test_what_does_not_fit_is_refused(self, value: float) -> None:
        with pytest.raises(RangeError, match="not finite, or too large"):
            tacit.tensor([value]).fix_prec()


class TestSharing:
    def test_what_is_shared_comes_back(self, private: Callable[..., PrivateTensor]) -> None:
        assert torch.equal(private(X).get().float_prec(), X)

    def test_the_vocabulary_in_one_line(self, parties: Cluster) -> None:
        x = tacit.tensor([0.1, 0.2]).fix_prec().share(parties.alice, parties.bob, crypto_provider=parties.provider)
        assert (x + x).get().float_prec().tolist() == pytest.approx([0.2, 0.4])

    def test_it_is_a_tensor(self, private: Callable[..., PrivateTensor]) -> None:
        x = private(X)
        assert isinstance(x, torch.Tensor)
        assert (x.shape, x.dtype, x.dim(), len(x), x.numel()) == (X.shape, torch.float32, 2, 2, 6)

    def test_the_two_shares_differ_from_the_number_and_between_runs(self, parties: Cluster) -> None:
        first, second = shared_in(parties, X), shared_in(parties, X)
        assert not torch.equal(first._shares[0].words, second._shares[0].words)
        for side in (*first._shares, *second._shares):
            assert not bool((side.words == (X * 65536).long()).any())

    def test_other_parties_are_refused(self, parties: Cluster) -> None:
        other, fixed = Cluster(prg(1)), tacit.tensor([1.0]).fix_prec()
        for alice, bob, provider in (
            (parties.bob, parties.alice, parties.provider),
            (parties.alice, parties.alice, parties.provider),
            (parties.alice, other.bob, parties.provider),
            (parties.alice, parties.bob, other.provider),
            (parties, parties.bob, parties.provider),
        ):
            with pytest.raises(InputError, match="of one cluster, in this order"):
                fixed.share(alice, bob, crypto_provider=provider)

    def test_a_number_outside_the_range_is_refused(self, private: Callable[..., PrivateTensor]) -> None:
        with pytest.raises(RangeError, match="16384"):
            private(torch.tensor([16384.0]))


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "@": lambda x, y: x @ y.T,
}


@pytest.mark.parametrize("name", BINARY)
class TestArithmetic:
    def test_with_another_private_tensor(self, name: str, private: Callable[..., PrivateTensor]) -> None:
        close(BINARY[name](private(X), private(Y)), BINARY[name](X, Y))

    def test_with_itself(self, name: str, private: Callable[..., PrivateTensor]) -> None:
        x = private(X)
        close(BINARY[name](x, x), BINARY[name](X, X))

    def test_with_a_plain_tensor_on_either_side(self, name: str, private: Callable[..., PrivateTensor]) -> None:
        close(BINARY[name](private(X), Y), BINARY[name](X, Y))
        close(BINARY[name](X, private(Y)), BINARY[name](X, Y))

    def test_broadcast(self, name: str, private: Callable[..., PrivateTensor]) -> None:
        if name != "@":
            close(BINARY[name](private(X), private(PLAIN)), BINARY[name](X, PLAIN))
            close(BINARY[name](private(X), PLAIN), BINARY[name](X, PLAIN))
            close(BINARY[name](PLAIN, private(X)), BINARY[name](PLAIN, X))

    @pytest.mark.parametrize("number", [3, -2.5, 0, 0.001])
    def test_with_a_number_on_either_side(
        self, name: str, number: float, private: Callable[..., PrivateTensor]
    ) -> None:
        if name != "@":
            close(BINARY[name](private(X), number), BINARY[name](X, number))
            close(BINARY[name](number, private(X)), BINARY[name](number, X))


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "negation": lambda x: -x,
    "division by a number": lambda x: x / 4 + x / 3,
    "division by a tensor": lambda x: x / torch.tensor([2.0, 4.0, -8.0]),
    "a long product": lambda x: x * x * x * x * 0.01,
    "a product of products": lambda x: ((x * x) * (x * x)) @ (x * x * x).T * 0.001,
    "relu": lambda x: x.relu(),
    "functional relu": lambda x: functional.relu(x * x - 2),
    "views": lambda x: x.T.reshape(2, 3).flatten()[1:5].view(2, 2),
    "an element": lambda x: x[1, 2],
    "sums and means": lambda x: x.sum() + x.mean(0) - x.sum(1).mean(),
    "cat and stack": lambda x: torch.cat([x, -x], 1) + torch.stack([x[0], x[1]]).repeat_interleave(1, 0).sum(),
    "cat with a plain tensor": lambda x: torch.cat([x, torch.ones(2, 1)], 1),
    "matrix times vector": lambda x: x @ PLAIN,
    "relu of one number": lambda x: x.sum().relu(),
    "one number compared": lambda x: (x.sum() > 0) * x,
    "comparisons counted": lambda x: (x > 0) * 1.0 + (x > 1) * 1.0,
}


@pytest.mark.parametrize("name", CHAINS)
def test_what_works_on_a_tensor_works_on_a_private_one(name: str, private: Callable[..., PrivateTensor]) -> None:
    close(CHAINS[name](private(X)), CHAINS[name](X))


COMPARISONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    ">=": lambda x, y: x >= y,
    ">": lambda x, y: x > y,
    "<=": lambda x, y: x <= y,
    "<": lambda x, y: x < y,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_are_private_zeros_and_ones(name: str, private: Callable[..., PrivateTensor]) -> None:
    compare = COMPARISONS[name]
    for x, y, expected in (
        (private(X), private(Y), compare(X, Y)),
        (private(X), Y, compare(X, Y)),
        (private(X), 3.0, compare(X, torch.tensor(3.0))),
        (3, private(X), compare(torch.tensor(3.0), X)),
    ):
        result = compare(x, y)
        assert result.dtype == torch.bool
        assert result.get().float_prec().tolist() == expected.float().tolist()


class TestModules:
    image = torch.linspace(-2, 2, 72).mul(1000).round().div(1000).reshape(1, 2, 6, 6)

    @pytest.mark.parametrize(
        "module",
        [
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.Conv2d(2, 2, 3, groups=2, bias=False),
            nn.MaxPool2d(2),
            nn.MaxPool2d(3, 2, 1),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)),
        ],
        ids=str,
    )
    def test_a_plain_module_runs_on_a_private_image(
        self, module: nn.Module, private: Callable[..., PrivateTensor]
    ) -> None:
        close(module(private(self.image)), module(self.image))

    def test_a_plain_linear_layer(self, private: Callable[..., PrivateTensor]) -> None:
        layer = nn.Linear(3, 4)
        close(layer(private(X)), layer(X))
        assert layer.weight.grad is None

    def test_functional_conv_and_pool(self, private: Callable[..., PrivateTensor]) -> None:
        weight = torch.linspace(-1, 1, 54).reshape(3, 2, 3, 3)
        forward = lambda x: functional.max_pool2d(functional.conv2d(x, weight, padding=1), 2)  # noqa: E731
        close(forward(private(self.image)), forward(self.image))

    def test_private_weights(self, private: Callable[..., PrivateTensor]) -> None:
        close(functional.linear(private(X), private(Y), private(torch.ones(2))), functional.linear(X, Y, torch.ones(2)))


class TestRefusals:
    @pytest.mark.parametrize(
        ("call", "operator"),
        [
            (lambda x: x.tan(), "aten.tan.default"),
            (lambda x: x.lgamma(), "aten.lgamma.default"),
            (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
            (lambda x: bool(x.sum()), "aten."),
            (lambda x: x.tan_(), "aten.tan.default"),
        ],
    )
    def test_an_unsupported_operator_names_itself_and_the_caller_s_line(
        self, call: Callable[[Tensor], object], operator: str, private: Callable[..., PrivateTensor]
    ) -> None:
        with pytest.raises(UnsupportedOperator) as error:
            call(private(X))
        line = call.__code__.co_firstlineno
        assert operator in str(error.value)
        assert f"test_tensor.py:{line}" in str(error.value)
        assert "\n" not in str(error.value)

    def test_tensors_of_different_clusters_do_not_mix(self, private: Callable[..., PrivateTensor]) -> None:
        other = shared_in(Cluster(prg(1)), X)
        for mix in BINARY.values():
            with pytest.raises(InputError, match=r"test_tensor.py:\d+: the tensors are shared among different parties"):
                mix(private(X), other)

    @pytest.mark.parametrize("call", [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: float(x[0, 0])])
    def test_values_do_not_leave_on_the_side(
        self, call: Callable[[Tensor], object], private: Callable[..., PrivateTensor]
    ) -> None:
        with pytest.raises((RuntimeError, UnsupportedOperator)):
            call(private(X))

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30])
    def test_a_number_that_cannot_be_a_factor(self, number: float, private: Callable[..., PrivateTensor]) -> None:
        with pytest.raises(InputError):
            _ = private(X) * number

    @pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e30, -1e30])
    def test_a_number_that_cannot_be_a_summand(self, number: float, private: Callable[..., PrivateTensor]) -> None:
        with pytest.raises(InputError):
            _ = private(X) + number

    def test_minus_infinity_masks(self, private: Callable[..., PrivateTensor]) -> None:
        mask = torch.tensor([0.0, -float("inf")]).expand(X.shape[0], 2)
        close((private(X[:, :2]) + mask).softmax(1), (X[:, :2] + mask).softmax(1))

    def test_shapes_that_do_not_fit(self, private: Callable[..., PrivateTensor]) -> None:
        x = private(X)
        with pytest.raises((RuntimeError, InputError)):
            _ = x @ x
        close(x + x, X + X)  # and the parties are still in step

    def test_a_failed_call_leaves_the_parties_in_step(self, private: Callable[..., PrivateTensor]) -> None:
        x = private(X)
        with pytest.raises(UnsupportedOperator):
            x.tan()
        close(x.relu(), X.relu())
        close(x * x, X * X)


def test_it_prints_its_shape_and_no_value(private: Callable[..., PrivateTensor]) -> None:
    text = "PrivateTensor(shape=(2, 3), shared by alice and bob)"
    x = private(X)
    assert [repr(x), str(x), f"{x}"] == [text] * 3
    assert str([x[0, 0]]) == "[PrivateTensor(shape=(), shared by alice and bob)]"
