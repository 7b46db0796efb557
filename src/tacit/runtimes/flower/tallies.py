"""Counts and sums over all sites: how good the model is on what they keep back, and the moments of their features.

A tally is a few numbers a site, added up by a secure sum of their own or, where a run has none, in the clear. Both
ends derive how it is encoded from the run's settings, and what it is for from what the coordinator asked.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch

from tacit.errors import InputError
from tacit.federated.secure_sum.encoding import Encoding, Scalar
from tacit.federated.secure_sum.ring import Words
from tacit.ring.prg import Prg
from tacit.runtimes.flower.messages import Work

LARGEST = 2.0**14
"""The largest magnitude of a feature whose moments can be summed."""
MOST_LOSS = 1e4
_FINEST = 2.0**-20


@dataclass(frozen=True)
class Tally:
    """What numbers are summed.

    Args:
        scalars: what they are, with their bounds.
    """

    scalars: tuple[Scalar, ...]

    @classmethod
    def of_evaluation(cls, most_examples: int) -> Tally:
        """Examples tried, those classified correctly, and their losses."""
        bound = MOST_LOSS * most_examples
        return cls((_counted("examples", most_examples), _counted("correct", most_examples), _real("loss", bound)))

    @classmethod
    def of_moments(cls, most_examples: int, features: int) -> Tally:
        """Examples, and of each feature the sum of its values and of their squares."""
        return cls(
            (
                _counted("examples", most_examples),
                _real("sum of a feature", most_examples * LARGEST, features),
                _real("sum of a feature's squares", most_examples * LARGEST**2, features),
            )
        )

    def encoding(self, clients: int) -> Encoding:
        """How the numbers of one of ``clients`` sites become residues."""
        return Encoding(size=0, clip=1.0, clients=clients, bits=16, scalars=self.scalars)

    def encode(self, numbers: list[float], clients: int) -> Words:
        """A site's residues.

        Raises:
            RangeError: a number is beyond its bound.
        """
        return self.encoding(clients).encode(torch.empty(0), numbers, Prg.fresh()).words

    def decode(self, total: Words, clients: int) -> tuple[float, ...]:
        """The sums of the numbers."""
        return self.encoding(clients).decode(total)[1]

    def application(self, run: bytes, work: Work, round: int, model: bytes) -> bytes:
        """What the secure sum of this tally is for.

        Args:
            run: of `Terms`.
            work: what was asked for.
            round: of the model.
            model: the digest of the global model that came with the question.
        """
        hasher = hashlib.sha256(b"tacit/v1/sites/tally\0" + run + struct.pack("<Q", round) + model)
        hasher.update(f"{work}: {self.encoding(1).description}".encode())
        return hasher.digest()


def _counted(name: str, most: int) -> Scalar:
    if most < 1:
        raise InputError(f"secure_sum.most_examples={most}: give the most examples that a site may have, 1 or more")
    return Scalar(name, float(most))


def _real(name: str, bound: float, count: int = 1) -> Scalar:
    """A sum as finely as 2^60 steps allow."""
    return Scalar(name, bound, max(_FINEST, bound * 2.0**-60), count)
