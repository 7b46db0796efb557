"""The networks in JAX, and a compiled function run by SPU's two-party semi2k protocol, as two processes.

SPU's wheel offers no third-party dealer, so the first party deals while it computes (SPU's default): there is no
separate preprocessing, and times are all in. SPU compiles JAX, so the networks are written in it, with weights of the
size that PyTorch would draw; max-pooling stands before ReLU, which gives the same and costs SPU less.
"""

import multiprocessing
import socket
import sys
from collections.abc import Callable

import figures
import jax
import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu
from spu.utils import frontend

SHAPES = {
    "mlp": [(784, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
    "lenet": [(20, 1, 5, 5), (20,), (50, 20, 5, 5), (50,), (800, 500), (500,), (500, 10), (10,)],
}


def mlp(x, w1, b1, w2, b2, w3, b3):
    """784–128–128–10."""
    x = jax.nn.relu(x @ w1 + b1)
    return jax.nn.relu(x @ w2 + b2) @ w3 + b3


def _convolved(x, weight, bias):
    x = jax.lax.conv_general_dilated(x, weight, (1, 1), "VALID") + bias[None, :, None, None]
    return jax.nn.relu(jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"))


def lenet(x, w1, b1, w2, b2, w3, b3, w4, b4):
    """Caffe's LeNet with a ReLU after each convolution."""
    x = _convolved(_convolved(x, w1, b1), w2, b2)
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ w3 + b3) @ w4 + b4


NETS = {"mlp": mlp, "lenet": lenet}


def arrays(name: str, batch: int) -> list[np.ndarray]:
    """The input and the weights, the same in every process."""
    scales = [1 / np.sqrt(np.prod(shape[1:]) if len(shape) == 4 else shape[0]) for shape in SHAPES[name]]
    weights = [(scale * (2 * pattern(shape) - 1)) for scale, shape in zip(scales, SHAPES[name], strict=True)]
    return [pattern((batch, *figures.ITEM_SHAPE[name])), *weights]


def pattern(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) without a short period; their values do not influence any time."""
    return (np.arange(np.prod(shape)) * 0.6180339887 % 1).astype(np.float32).reshape(shape)


def configuration() -> libspu.RuntimeConfig:
    """semi2k over Z/2^64, one thread."""
    config = libspu.RuntimeConfig(libspu.ProtocolKind.SEMI2K, libspu.FieldType.FM64)
    config.max_concurrency = 1
    config.experimental_enable_intra_op_par = False
    return config


def party(
    rank: int, ports: list[int], shares: list, code: bytes, outputs: list[str], repeat: int, results
) -> None:  # fmt: skip
    """One party's process."""
    description = libspu.link.Desc()
    for number, port in enumerate(ports):
        description.add_party(f"party{number}", f"127.0.0.1:{port}")
    link = libspu.link.create_brpc(description, rank)
    runtime = spu.Runtime(link, configuration())
    names = [f"in{number}" for number in range(len(shares))]
    executable = libspu.Executable(name="bench", input_names=names, output_names=outputs, code=code)
    times = []
    for _ in range(repeat + 1):
        for variable, share in zip(names, shares, strict=True):
            runtime.set_var(variable, share)
        link.barrier()
        times.append(figures.timed(lambda: runtime.run(executable))[0])
    link.barrier()
    results.put((rank, times[1:], [runtime.get_var(output) for output in outputs]))
    results.close()
    results.join_thread()


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(function: Callable, values: list[np.ndarray], repeat: int) -> tuple[list[float], float]:
    """Run a function of secret arrays; it gives an array or several.

    Returns:
        Seconds of every repeat, after one that warms up, and the largest difference from JAX in the clear.
    """
    expected = [np.asarray(one) for one in jax.tree.leaves(function(*values))]
    names, outputs = ([f"{kind}{n}" for n in range(len(of))] for kind, of in (("in", values), ("out", expected)))
    secret = [libspu.Visibility.VIS_SECRET] * len(values)
    compiled, _ = frontend.compile(frontend.Kind.JAX, function, values, {}, names, secret, lambda out: outputs)
    io = spu.Io(2, configuration())
    shares = [io.make_shares(value, libspu.Visibility.VIS_SECRET) for value in values]
    spawn = multiprocessing.get_context("spawn")
    results, ports = spawn.Queue(), free_ports(2)
    processes = [
        spawn.Process(
            target=party, args=(rank, ports, [pair[rank] for pair in shares], compiled.code, outputs, repeat, results)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = sorted((results.get(timeout=900) for _ in processes), key=lambda answer: answer[0])
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("one of SPU's processes failed: see above")
    computed = [io.reconstruct(list(pair)) for pair in zip(answers[0][2], answers[1][2], strict=True)]
    return answers[0][1], max(float(np.abs(a - b).max()) for a, b in zip(computed, expected, strict=True))


def versions() -> dict[str, str]:
    """Of what computes."""
    return {"spu": spu.__version__, "jax": jax.__version__}
