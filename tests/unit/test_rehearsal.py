"""A rehearsal, in a process of its own: the first real run after it has nothing to compile, and is right."""

import subprocess
import sys

REHEARSED = """
import torch
from torch import nn
from tacit.identity import Identity, key_text
from tacit.mpc import kernels
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import reconstruct, share
from tacit.party import push
from tacit.party.dealing import DealtModel
from tacit.party.loaded import LoadedModel
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.kernels import gemm
from tacit.ring.prg import Prg

def compiled():
    loops = {**vars(kernels), **vars(gemm)}
    return {name: loop.signatures for name, loop in loops.items() if hasattr(loop, "signatures")}

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 64), nn.GELU(), nn.Linear(64, 3)
).eval()
owner, item = key_text(Identity.fresh().public), torch.randn(2, 1, 8, 8)
pushed = push.prepare(model, [item], name="m", owner=owner, batch_sizes=(1, 2))
with torch.inference_mode():
    parties = LoadedModel(pushed.alice), LoadedModel(pushed.bob)
    parties[0].rehearse(1)
    before = compiled()
    assert any(before.values()), "compiled loops were not used"
    draw, trio = DealtModel(pushed.provider).draw(2), Trio()
    corrections = [tensor for tensors in draw.corrections for tensor in tensors]
    pools = parties[0].expand(2, draw.alice, ()), parties[1].expand(2, draw.bob, corrections)
    dealt = trio.deal(())
    for correlation in parties[0].cost(2).correlations:
        dealt.append((correlation, *(pool.take(correlation) for pool in pools)))
    shares = share(encode(item), FRACTION_BITS, Prg.fresh())
    results = trio.run(*(party.run(2, [half]) for party, half in zip(parties, shares)), None, dealt)
    found = reconstruct(*(outputs[0] for outputs in results))
    assert (found - model(item)).abs().max() < 2.0**-8
    assert compiled() == before
print("as rehearsed")
"""


def test_a_run_after_a_rehearsal_compiles_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", REHEARSED], capture_output=True, text=True, check=False)
    assert done.stdout == "as rehearsed\n", done.stderr
