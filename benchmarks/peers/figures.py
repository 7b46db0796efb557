"""What every peer's script takes and prints. It stands alone, in environments that hold a peer and no tacit."""

import json
import statistics
import sys
import time
from collections.abc import Callable

ITEM_SHAPE = {"mlp": (784,), "lenet": (1, 28, 28)}
"""mlp is 784–128–128–10; lenet is Caffe's LeNet with a ReLU after each convolution."""
CLASSES = 10
LEARNING_RATE = 0.1
"""Of the step of SGD that training measures."""


def arguments() -> tuple[str, int, int]:
    """NET BATCH REPEAT from the command line."""
    if len(sys.argv) != 4 or sys.argv[1] not in ITEM_SHAPE:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(ITEM_SHAPE)} BATCH REPEAT")
    return sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Seconds that ``work()`` takes, and its result."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def report(peer: str, net: str, batch: int, online: list[float], **figures: object) -> None:
    """Print the figures as one line of JSON."""
    row = {"peer": peer, "net": net, "batch": batch, "online_s": statistics.median(online), "online_min_s": min(online)}
    print(json.dumps(row | figures), flush=True)
