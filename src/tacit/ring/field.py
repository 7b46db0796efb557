"""Sharing numbers among any number of parties, modulo a large prime.

This is secret sharing in its smallest form, the place to start reading. A number x becomes n shares: n - 1 of them are
uniform in the field, and the last is what makes all of them sum to x modulo Q. Any n - 1 shares are independent of x.

>>> five, seven = encrypt(5), encrypt(7)
>>> decrypt(five + seven)
12

Networks run on two-party shares in Z/2^64 (`tacit.mpc`), where hardware does the modular reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from tacit.errors import InputError
from tacit.ring.prg import Prg

PRIME = 2**127 - 1
PRIME_256 = 2**256 - 189
"""The largest prime below 2^256: an element is 32 bytes, and an X25519 private key, below 2^255, is one."""


@dataclass(frozen=True, repr=False)
class SharedNumber:
    """A number split into one share a party.

    Sums, differences and products with a public integer are computed by every party on its own share.

    Args:
        shares: one field element a party, in [0, modulus).
        modulus: the field's size Q.
    """

    shares: tuple[int, ...]
    modulus: int = PRIME

    def __add__(self, other: SharedNumber) -> SharedNumber:
        if (len(self.shares), self.modulus) != (len(other.shares), other.modulus):
            raise InputError("numbers can be added when they are shared among the same parties under the same modulus")
        pairs = zip(self.shares, other.shares, strict=True)
        return SharedNumber(tuple((x + y) % self.modulus for x, y in pairs), self.modulus)

    def __mul__(self, factor: int) -> SharedNumber:
        return SharedNumber(tuple(share * factor % self.modulus for share in self.shares), self.modulus)

    __rmul__ = __mul__

    def __neg__(self) -> SharedNumber:
        return self * -1

    def __sub__(self, other: SharedNumber) -> SharedNumber:
        return self + -other

    def __repr__(self) -> str:
        return f"SharedNumber({len(self.shares)} shares hidden, modulus of {self.modulus.bit_length()} bits)"


def encrypt(number: int, parties: int = 3, modulus: int = PRIME, prg: Prg | None = None) -> SharedNumber:
    """Split ``number`` into ``parties`` shares.

    Args:
        number: an integer of magnitude at most (modulus - 1) / 2; negative numbers are the field's upper half.
        parties: how many shares, at least 2.
        modulus: an odd prime.
        prg: where the shares come from; the operating system if not given.

    Raises:
        InputError: fewer than two parties, or a number outside the field's range.
    """
    if parties < 2:
        raise InputError(f"parties is {parties}: sharing a number takes at least 2")
    if abs(number) > (modulus - 1) // 2:
        raise InputError(f"the number does not fit: magnitudes up to {(modulus - 1) // 2} do under this modulus")
    prg = prg or Prg.fresh()
    masks = tuple(prg.below(modulus) for _ in range(parties - 1))
    return SharedNumber((*masks, (number - sum(masks)) % modulus), modulus)


def decrypt(number: SharedNumber) -> int:
    """Put all shares together: their sum modulo Q, read as a signed integer."""
    total = sum(number.shares) % number.modulus
    return total if total <= (number.modulus - 1) // 2 else total - number.modulus


def inverses(elements: Sequence[int], modulus: int) -> list[int]:
    """1 / x for every x modulo a prime, for the price of one inversion and three products each (Montgomery).

    Raises:
        InputError: an element is 0 modulo the prime.
    """
    products = list(accumulate(elements, lambda x, y: x * y % modulus, initial=1))
    if products[-1] == 0:
        raise InputError("0 has no inverse: leave it out")
    inverse = pow(products[-1], -1, modulus)
    result = [0] * len(elements)
    for i in reversed(range(len(elements))):
        result[i] = inverse * products[i] % modulus
        inverse = inverse * elements[i] % modulus
    return result
