"""Fuzz one decoder, guided by the coverage of tacit's code.

    python tests/fuzz.py NAME [options of libFuzzer, such as -max_total_time=60]

Ends with exit code 0 if every input parsed or raised the documented error, in the memory and time that the options
allow. The target ``planted`` has a fault in it, by which the fuzzer shows that it finds some.
"""

import contextlib
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris
import msgspec

with atheris.instrument_imports(include=["decoders", "tacit.wire", "tacit.party"]):
    from decoders import DECODERS, Decoder, planted
from tacit.errors import CodecError, PeerError

UNCHANGED = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)
"""What msgpack that is none, or that has become none, leads to."""


def mutator(decoder: Decoder) -> Any:
    """Changes bytes as libFuzzer does, and every other time the structure that they encode."""

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        if decoder.packed and seed % 2:
            with contextlib.suppress(*UNCHANGED):
                changed = msgspec.msgpack.encode(altered(msgspec.msgpack.decode(data), random.Random(seed)))
                if len(changed) <= size:
                    return changed
        mutated: bytes = atheris.Mutate(data, size)
        return mutated

    return mutate


def altered(tree: Any, draw: random.Random) -> Any:
    """A tree with one part replaced, left out, repeated or moved."""
    kids = list(tree) if isinstance(tree, list) else list(tree.items()) if isinstance(tree, dict) else []
    if not kids or draw.random() < 0.2:
        return draw.choice(
            [None, True, -1, 0, 1 << 31, 1 << 63, 0.5, float("nan"), "", "ref", b"", bytes(32), [], {}, tree]
        )
    place, what = draw.randrange(len(kids)), draw.choice(["descend", "descend", "drop", "repeat", "swap"])
    if what == "drop":
        del kids[place]
    elif what == "repeat":
        kids.insert(place, kids[place])
    elif what == "swap":
        other = draw.randrange(len(kids))
        kids[place], kids[other] = kids[other], kids[place]
    elif isinstance(tree, dict):
        kids[place] = kids[place][0], altered(kids[place][1], draw)
    else:
        kids[place] = altered(kids[place], draw)
    return dict(kids) if isinstance(tree, dict) else kids


def main() -> None:
    """Fuzz until libFuzzer ends the process."""
    name, *options = sys.argv[1:]
    decoder = planted() if name == "planted" else DECODERS[name]
    ends = PeerError if name == "link" else CodecError

    def one(data: bytes) -> None:
        with contextlib.suppress(ends):
            decoder.decode(data)

    with tempfile.TemporaryDirectory() as folder:
        for number, example in enumerate(decoder.examples()):
            (Path(folder) / str(number)).write_bytes(example)
        atheris.Setup([sys.argv[0], *options, folder], one, custom_mutator=mutator(decoder))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
