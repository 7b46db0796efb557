"""Models in files: Python that is the owner's own, weights that are data, and nothing that is unpickled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tacit
from tacit.errors import DataError, InputError
from tacit.party.sources import array, example, factory, load_weights, module, save_weights
from tacit.program.calibrate import save_model


def test_a_factory_is_found_in_its_file(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("from torch import nn\nWIDTH = 3\ndef build():\n    return nn.Linear(WIDTH, 2)\n")
    assert factory(f"{path}:build")().in_features == 3
    for name in ("missing", "WIDTH"):
        with pytest.raises(InputError, match=f"no function or class '{name}'"):
            factory(f"{path}:{name}")
    for text in (f"{tmp_path}/other.py:build", "model", str(path), f"{tmp_path}:build"):
        with pytest.raises(InputError, match=r"give FILE\.py:FACTORY"):
            factory(text)


def test_weights_are_loaded_whole_or_not_at_all(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    other = nn.Linear(3, 2)
    assert load_weights(other, path) is None
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(DataError, match="does not hold the weights of this Conv2d"):
        load_weights(nn.Conv2d(1, 1, 1), path)
    save_file({"weight": model.weight}, path)
    with pytest.raises(DataError, match="bias"):
        load_weights(nn.Linear(3, 2), path)
    path.write_bytes(b"no weights")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_weights(model, path)
    with pytest.raises(DataError, match="not a readable safetensors file"):
        load_weights(model, tmp_path / "missing.safetensors")


def test_a_calibration_comes_with_its_weights(tmp_path: Path) -> None:
    model, path = nn.Sequential(nn.Linear(3, 2), nn.ReLU()), tmp_path / "weights.safetensors"
    with tacit.cluster() as parties:
        calibration = parties.encrypt(model, torch.zeros(1, 3)).calibrate(torch.ones(4, 3))
    save_model(path, model, calibration)
    other = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert load_weights(other, path) == calibration
    assert calibration.context(other).windows


@pytest.mark.parametrize("name", ["model.pt2", "model.pt", "weights.PTH", "weights.ckpt", "pytorch_model.bin", "x.pkl"])
def test_what_would_be_unpickled_is_refused_unread(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for refused in (
        lambda: factory(str(path)),
        lambda: load_weights(nn.Linear(1, 1), path),
        lambda: example(str(path)),
    ):
        with pytest.raises(InputError, match=r"read by unpickling.*FILE\.py:FACTORY"):
            refused()


def test_examples(tmp_path: Path) -> None:
    assert example("1,28,28").shape == (1, 1, 28, 28)
    np.save(tmp_path / "whole.npy", np.array([[3, 1]]))
    np.save(tmp_path / "real.npy", np.array([[0.5, 1.0]]))
    assert example(str(tmp_path / "whole.npy")).dtype == torch.int64
    assert example(str(tmp_path / "real.npy")).dtype == torch.float32
    for text in ("", "1,x", "0", "-1,2", "example.png"):
        with pytest.raises(InputError, match="shape of an item"):
            example(text)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "broken.npy").write_bytes(b"x")
    np.save(tmp_path / "complex.npy", np.array([1j]))
    (tmp_path / "archive.npy").write_bytes(b"")
    np.savez(tmp_path / "archive.npz", x=np.zeros(3))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    for name, why in {
        "object": "not a readable .npy array of numbers",
        "text": "not a readable .npy array of numbers",
        "broken": "not a readable .npy array of numbers",
        "archive": "not a readable .npy array of numbers",
        "missing": "there is no file",
        "complex": "complex numbers",
    }.items():
        with pytest.raises(DataError, match=why):
            example(str(tmp_path / f"{name}.npy"))
    np.save(tmp_path / "swapped.npy", np.array([1.5, 2.5], dtype=">f8"))
    assert torch.equal(array(tmp_path / "swapped.npy"), torch.tensor([1.5, 2.5], dtype=torch.float64))


def test_what_a_factory_makes_is_a_module(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(
        "from torch import nn\ndef sized(width):\n    return nn.Linear(width, 2)\ndef wrong():\n    return {}\n"
    )
    with pytest.raises(
        InputError, match=r"cannot be called without arguments \(missing a required argument: 'width'\)"
    ):
        module(f"{path}:sized")
    with pytest.raises(InputError, match=r"makes a dict: give what makes a torch\.nn\.Module"):
        module(f"{path}:wrong")


def test_weights_are_written_for_their_owner_alone_and_over_nothing(tmp_path: Path) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "weights.safetensors"
    save_weights(model.state_dict(), path)
    assert path.stat().st_mode & 0o777 == 0o600
    other = nn.Linear(3, 2)
    load_weights(other, path)
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(InputError, match="is there already"):
        save_weights(model.state_dict(), path)
    with pytest.raises(InputError, match="no weights can be written to"):
        save_weights(model.state_dict(), tmp_path / "nowhere" / "weights.safetensors")
