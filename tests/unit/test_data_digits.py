import sys

import pytest
import torch

from tacit.data.digits import load_digits
from tacit.errors import InputError

pytest.importorskip("sklearn")


def test_shapes_scale_and_split() -> None:
    digits = load_digits()
    assert (digits.name, digits.classes) == ("digits", 10)
    assert digits.train.inputs.shape == (1437, 1, 28, 28)
    assert digits.test.inputs.shape == (360, 1, 28, 28)
    assert digits.train.inputs.dtype == torch.float32
    assert digits.train.targets.dtype == torch.int64
    assert (float(digits.train.inputs.min()), float(digits.train.inputs.max())) == (0.0, 1.0)
    for part in (digits.train, digits.test):
        shares = part.targets.bincount(minlength=10) / len(part)
        assert float((shares - 0.1).abs().max()) < 0.005


def test_the_split_is_always_the_same() -> None:
    first, second = load_digits(), load_digits()
    assert torch.equal(first.test.inputs, second.test.inputs)
    assert torch.equal(first.train.targets, second.train.targets)


def test_training_and_test_images_are_apart() -> None:
    digits = load_digits()
    rows = {tuple(image.flatten().tolist()) for image in digits.train.inputs}
    assert not any(tuple(image.flatten().tolist()) in rows for image in digits.test.inputs)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'tacit\[demo\]'"):
        load_digits()
