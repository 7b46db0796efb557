"""A node for flower_rounds.py that answers as tacit's sites do, in one process, with the ClientApp of flower_app.

flower_node.py FEDERATION NAME
"""

import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from tacit.identity import Identity
from tacit.runtimes.flower.federation_file import FederationFile, node_key
from tacit.runtimes.flower.supernode import SuperNode

sys.path.insert(0, str(Path(__file__).parent / "flower_app"))
from fedavg_mnist.client import app

folder, name = Path(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
config = {"data": str(folder / name)}
link = FederationFile.read(folder / "federation.toml").superlink
node = SuperNode(
    link,
    node_key(Identity.load(folder / f"{name}.key")),
    lambda message, context: app(message, replace(context, node_config=config)),
    print,
)
signal.signal(signal.SIGTERM, lambda number, frame: node.stop())
node.run()
