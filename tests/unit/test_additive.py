"""Sums of secrets among any number of parties."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import tacit
from engine import prg
from tacit.additive import AdditiveTensor, share_additively, split
from tacit.errors import InputError, UnsupportedOperator

HOLDERS = ("alice", "bob", "carol", "dave")
X = torch.tensor([[1, -2, 3], [40, 5, -(2**62)]])
Y = torch.tensor([[7, 8, -9], [1, 0, 5]])


def shared(values: Tensor, count: int = 3, seed: int = 0) -> AdditiveTensor:
    return share_additively(values, HOLDERS[:count], prg(seed))


@pytest.mark.parametrize("count", [2, 3, 4])
class TestSplitting:
    def test_the_shares_add_up(self, count: int) -> None:
        assert torch.equal(sum(split(X, count, prg())), X)
        assert torch.equal(shared(X, count).get().units, X)

    def test_all_but_one_share_are_independent_of_the_secret(self, count: int) -> None:
        first, second = split(X, count, prg()), split(Y, count, prg())
        assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
        assert not torch.equal(first[-1], second[-1])

    def test_the_last_share_is_masked_by_every_other(self, count: int) -> None:
        shares = split(X, count, prg())
        for left_out in range(count - 1):
            partial = sum(share for i, share in enumerate(shares) if i != left_out)
            assert not bool((partial == X).any())

    def test_refreshed_shares_are_new_ones_of_the_same_secret(self, count: int) -> None:
        one = shared(X, count)
        other = one.refresh()
        assert torch.equal(other.get().units, X)
        assert all(not torch.equal(a, b) for a, b in zip(one._shares, other._shares, strict=True))


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "with alpha": lambda x, y: torch.add(x, y, alpha=3),
    "negation": lambda x, y: -x - y,
    "a public summand on either side": lambda x, y: 5 + x - 7 + (2 - y),
    "a public tensor": lambda x, y: x + torch.tensor([1, -1, 2]) - y,
    "whole multiples": lambda x, y: x * 3 - y * torch.tensor([1, 2, 3]) + 2 * y,
    "public matrices": lambda x, y: x @ torch.tensor([[1, 2], [0, -1], [3, 0]]) + torch.tensor([[1], [3]]).T @ y[:, :2],
    "sums": lambda x, y: x.sum(0) + y.sum(),
    "views": lambda x, y: x.T.reshape(-1)[1:4] + y.flatten()[:3].flip(0),
    "cat and stack": lambda x, y: torch.cat([x, y]).sum(0) + torch.stack([x, y])[1, 0],
    "parts": lambda x, y: x.split(1, 1)[2] + y.unbind(1)[0].unsqueeze(1),
    "in place": lambda x, y: x.clone().add_(y).mul_(2).sub_(1),
}  # fmt: skip


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("count", [2, 3])
def test_linear_operators_are_exact(name: str, count: int) -> None:
    result = LINEAR[name](shared(X, count), shared(Y, count, 1))
    assert isinstance(result, AdditiveTensor)
    assert torch.equal(result.get().units, LINEAR[name](X, Y))


class TestFixedPrecision:
    values = torch.tensor([0.125, -3.5, 1000.25])

    def private(self) -> AdditiveTensor:
        return share_additively(tacit.tensor(self.values).fix_prec(), HOLDERS[:3])

    def test_numbers_with_digits_add_up(self) -> None:
        total = self.private() + self.private() + 0.5 - torch.tensor([1.0, 2.0, 3.0])
        expected = 2 * self.values + 0.5 - torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(total.get().float_prec(), expected)

    def test_a_hundred_owners_sum(self) -> None:
        owners = [torch.full((2,), i / 100) for i in range(100)]
        total = sum(share_additively(tacit.tensor(one).fix_prec(2), HOLDERS) for one in owners)
        assert total.get().float_prec().tolist() == pytest.approx([49.5, 49.5])


class TestRefusals:
    def test_floats_are_rounded_first(self) -> None:
        with pytest.raises(InputError, match=r"fix_prec\(\) it first"):
            share_additively(torch.tensor([0.5]), HOLDERS)

    @pytest.mark.parametrize("holders", [("alice",), (), ("alice", "alice")])
    def test_holders_are_two_or_more_different_ones(self, holders: tuple[str, ...]) -> None:
        with pytest.raises(InputError, match="two or more different"):
            share_additively(X, holders)

    @pytest.mark.parametrize(
        "call", [lambda x: x * x, lambda x: x > 0, lambda x: x.max(), lambda x: x @ x.T, lambda x: x / 2]
    )
    def test_what_is_not_linear(self, call: Callable[[Tensor], object]) -> None:
        with pytest.raises(UnsupportedOperator, match="crypto provider"):
            call(shared(X))

    @pytest.mark.parametrize("call", [lambda x: x * 0.5, lambda x: x + 0.5, lambda x: x * torch.tensor(1.5)])
    def test_factors_and_summands_of_whole_numbers_are_whole(self, call: Callable[[Tensor], object]) -> None:
        with pytest.raises(UnsupportedOperator, match="whole"):
            call(shared(X))

    def test_different_holders_or_digits_do_not_mix(self) -> None:
        for other in (shared(X, 2), share_additively(tacit.tensor(Y).fix_prec(), HOLDERS[:3])):
            with pytest.raises(InputError, match="different"):
                _ = shared(X) + other

    def test_it_prints_no_value(self) -> None:
        assert repr(shared(torch.tensor([25]))) == "AdditiveTensor(shape=(1,), shared by alice, bob, carol)"
