"""Encrypted training with SPU's two-party semi2k protocol: a step of SGD on cross-entropy, its gradient by JAX.

Images, one-hot labels, weights and gradients are shared, and so are the new weights.
"""

import statistics

import figures
import jax
import jax.numpy as jnp
import numpy as np
import spu_peer


def loss(weights, model, images, targets):
    """Cross-entropy of one-hot targets, averaged over the batch."""
    return -jnp.mean(jnp.sum(jax.nn.log_softmax(model(images, *weights)) * targets, axis=1))


def step(model):
    """The new weights, as a function of images, targets and weights."""

    def update(images, targets, *weights):
        gradients = jax.grad(loss)(weights, model, images, targets)
        return tuple(w - figures.LEARNING_RATE * g for w, g in zip(weights, gradients, strict=True))

    return update


if __name__ == "__main__":
    name, batch, repeat = figures.arguments()
    images, *weights = spu_peer.arrays(name, batch)
    targets = np.eye(figures.CLASSES, dtype=np.float32)[np.arange(batch) % figures.CLASSES]
    times, error = spu_peer.run(step(spu_peer.NETS[name]), [images, targets, *weights], repeat)
    figures.report(
        "spu",
        name,
        batch,
        times,
        all_in_s=statistics.median(times),
        max_abs_error_weights=error,
        versions=spu_peer.versions(),
    )
