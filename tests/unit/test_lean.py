"""Planning in a process of the service: the same plan as elsewhere, and torch's compiler is not loaded for it."""

import subprocess
import sys

import torch
from torch import nn

from tacit.party.programs import Program, decode_program, encode_program
from tacit.program.lowering import Context
from tacit.program.network import NETWORKS
from tacit.program.rewrite import Model, simplify
from tacit.trace import trace

PLANNING = """
import sys
from tacit.party.lean import leave_compiler_out
from tacit.party.programs import decode_program
from tacit.party import service, worker

leave_compiler_out()
cost = decode_program(sys.stdin.buffer.read()).cost()
print(cost.rounds, cost.bytes_online, cost.bytes_dealt, "torch._dynamo" in sys.modules)
"""


def test_a_model_is_planned_without_the_compiler() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 6), nn.GELU(),
        nn.LayerNorm(6), nn.Linear(6, 3), nn.Softmax(1),
    ).eval()  # fmt: skip
    simple = simplify(Model(*trace(model, (torch.zeros(2, 1, 8, 8),))))
    shapes = {name: tuple(value.shape) for name, value in simple.state.items()}
    program = encode_program(Program(simple.graph, shapes, ((2, 1, 8, 8),), Context(network=NETWORKS["wan"])))
    done = subprocess.run([sys.executable, "-c", PLANNING], input=program, capture_output=True, check=True)
    cost = decode_program(program).cost()
    assert done.stdout.decode().split() == [*map(str, (cost.rounds, cost.bytes_online, cost.bytes_dealt)), "False"]
