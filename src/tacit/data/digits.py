"""The 1,797 handwritten digits bundled with scikit-learn (Alpaydin and Kaynak 1998): no file, no network."""

from __future__ import annotations

import torch
from torch.nn import functional

from tacit.data.examples import Dataset, Examples
from tacit.errors import InputError


def load_digits() -> Dataset:
    """The digits as 28 × 28 images, four fifths for training and one fifth for testing.

    The 8 × 8 originals are enlarged bilinearly. The split is stratified by class and always the same.

    Returns:
        Images as float32 ``(n, 1, 28, 28)`` in [0, 1], labels as int64 ``(n,)``.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection  # noqa: PLC0415
    except ImportError:
        raise InputError("the digits come with scikit-learn: install it by `pip install 'tacit[demo]'`") from None
    pixels, labels = datasets.load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    images = functional.interpolate(small, size=(28, 28), mode="bilinear")
    everything = Examples(images, torch.from_numpy(labels).long())
    train, test = model_selection.train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.2, stratify=labels, random_state=0
    )
    return Dataset("digits", everything.subset(torch.from_numpy(train)), everything.subset(torch.from_numpy(test)), 10)
