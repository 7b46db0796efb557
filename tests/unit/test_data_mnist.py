import gzip
import re
import struct
from pathlib import Path

import pytest
import torch

from tacit.data.examples import Dataset
from tacit.data.mnist import load_mnist
from tacit.errors import DataError

IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TACIT_DATA", raising=False)


@pytest.fixture
def folder(tmp_path: Path, tiny_mnist: dict[str, bytes]) -> Path:
    for name, content in tiny_mnist.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        load_mnist(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shapes_types_and_scale(folder: Path) -> None:
    dataset = load_mnist(folder)
    assert (dataset.name, dataset.classes) == ("mnist", 10)
    assert dataset.train.inputs.shape == (6, 1, 28, 28)
    assert dataset.train.inputs.dtype == torch.float32
    assert dataset.train.inputs[0, 0, 0, :3].tolist() == pytest.approx([0.0, 1 / 255, 2 / 255])
    assert float(dataset.train.inputs.max()) == 1.0
    assert dataset.train.targets.dtype == torch.int64
    assert dataset.train.targets.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACIT_DATA", str(folder))
    assert len(load_mnist().test) == 4


def test_the_argument_beats_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TACIT_DATA", str(folder / "elsewhere"))
    assert len(load_mnist(folder).test) == 4


def test_a_subfolder_called_mnist_comes_first(folder: Path, tiny_mnist: dict[str, bytes]) -> None:
    (folder / "mnist").mkdir()
    for name, content in tiny_mnist.items():
        (folder / "mnist" / name).write_bytes(content)
        (folder / name).write_bytes(b"damaged")
    assert len(load_mnist(folder).train) == 6


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / LABELS).unlink()
    message = refusal(folder)
    assert message.startswith(f"{LABELS} is neither in {folder / 'mnist'} nor in {folder}")
    assert "put it there" in message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


def test_a_folder_that_is_a_file(folder: Path) -> None:
    assert f"neither in {folder / LABELS}" in refusal(folder / LABELS)


def test_an_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert re.search(f"{IMAGES} cannot be read .*Permission denied.*check the permissions", refusal(folder))


def test_an_unreadable_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", deny)
    assert f"{IMAGES} cannot be read" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 1, 10, 100, -1])
def test_truncation(folder: Path, tiny_mnist: dict[str, bytes], keep: int) -> None:
    (folder / IMAGES).write_bytes(tiny_mnist[IMAGES][:keep])
    assert str(folder / IMAGES) in refusal(folder)


def test_every_flipped_bit_of_a_file_is_refused(folder: Path, tiny_mnist: dict[str, bytes]) -> None:
    original = tiny_mnist[LABELS]
    for bit in range(8 * len(original)):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / LABELS).write_bytes(damaged)
        assert str(folder / LABELS) in refusal(folder)


def test_another_well_formed_file_is_refused_by_its_checksum(folder: Path) -> None:
    (folder / LABELS).write_bytes(gzip.compress(struct.pack(">2I", 0x0801, 6) + bytes(6)))
    message = refusal(folder)
    assert re.search(
        f"{LABELS} is not the published {LABELS}, SHA-256 expected [0-9a-f]{{64}}, found [0-9a-f]{{64}}",
        message,
    )
    assert message.endswith("put the original file in its place")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (LABELS, struct.pack(">2I", 0x0801, 5) + bytes(5), "holds 5 labels for 6 images"),
        (LABELS, struct.pack(">2I", 0x0801, 6) + b"\0\0\0\0\0\x0a", "holds the label 10, expected 0 to 9"),
        (IMAGES, struct.pack(">4I", 0x0803, 6, 2, 3) + bytes(36), "holds images of 2 × 3 pixels"),
        (IMAGES, struct.pack(">2I", 0x0801, 6) + bytes(6), "ends within its header of 16 bytes"),
    ],
)
def test_wrong_structure(folder: Path, name: str, content: bytes, complaint: str) -> None:
    (folder / name).write_bytes(gzip.compress(content))
    message = refusal(folder)
    assert message.startswith(f"{folder / name} ")
    assert complaint in message


def test_the_real_files(mnist: Dataset) -> None:
    assert mnist.train.inputs.shape == (60_000, 1, 28, 28)
    assert mnist.test.inputs.shape == (10_000, 1, 28, 28)
    assert mnist.train.targets.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert float(mnist.train.inputs.mean()) == pytest.approx(0.1307, abs=1e-4)
