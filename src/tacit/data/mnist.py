"""MNIST: 60,000 training and 10,000 test images of handwritten digits (LeCun, Cortes and Burges 1998)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tacit.data.download import Progress, fetch
from tacit.data.examples import Dataset, Examples
from tacit.data.idx import parse_idx
from tacit.data.published import PublishedFile, damaged, in_folder
from tacit.errors import DataError

MIRRORS = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)

TRAIN_IMAGES = PublishedFile(
    "train-images-idx3-ubyte.gz",
    9_912_422,
    "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
)
TRAIN_LABELS = PublishedFile(
    "train-labels-idx1-ubyte.gz",
    28_881,
    "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
)
TEST_IMAGES = PublishedFile(
    "t10k-images-idx3-ubyte.gz",
    1_648_877,
    "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
)
TEST_LABELS = PublishedFile(
    "t10k-labels-idx1-ubyte.gz",
    4_542,
    "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)


def load_mnist(
    data_dir: Path | None = None,
    *,
    download: bool = True,
    progress: Progress | None = None,
    mirrors: Sequence[str] = MIRRORS,
) -> Dataset:
    """Read MNIST from its gzip-compressed IDX files.

    They are looked for in ``data_dir``, or else in the folder that the environment variable ``TACIT_DATA``
    names: there in ``mnist/``, then in the folder itself. With neither given they come from the cache,
    ``tacit/mnist`` under ``XDG_CACHE_HOME`` (``~/.cache``), which is filled by downloading. A folder that was
    named is never filled or replaced by another. Every file is checked for its structure, then its checksum.

    Args:
        data_dir: the folder with the files.
        download: whether files missing from the cache may be fetched from the network.
        progress: called as a download advances.
        mirrors: URLs to download from, in this order.

    Returns:
        Images as float32 ``(n, 1, 28, 28)`` in [0, 1] (0 is background), labels as int64 ``(n,)``.

    Raises:
        DataError: a file is missing, unreadable, truncated, corrupt or not the published one.
    """
    named = data_dir or os.environ.get("TACIT_DATA")

    def find(file: PublishedFile) -> Path:
        return _in_folder(Path(named), file) if named else _in_cache(file, download, progress, mirrors)

    return Dataset(
        name="mnist",
        train=_examples(TRAIN_IMAGES, TRAIN_LABELS, find),
        test=_examples(TEST_IMAGES, TEST_LABELS, find),
        classes=10,
    )


def _in_folder(folder: Path, file: PublishedFile) -> Path:
    if path := in_folder(folder, "mnist", file):
        return path
    raise DataError(
        f"{file.name} is neither in {folder / 'mnist'} nor in {folder}: "
        "put it there, or name no data folder to have it downloaded"
    )


def _in_cache(file: PublishedFile, download: bool, progress: Progress | None, mirrors: Sequence[str]) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tacit" / "mnist"
    path = folder / file.name
    if path.is_file():
        return path
    if not download:
        raise DataError(f"{path} is missing and downloading is off: allow it, or name a data folder that has the file")
    return fetch(file, folder, mirrors, progress)


def _examples(image_file: PublishedFile, label_file: PublishedFile, find: Callable[[PublishedFile], Path]) -> Examples:
    images_path, images_content = _read(image_file, find)
    labels_path, labels_content = _read(label_file, find)
    images = parse_idx(images_content, 3, images_path)
    labels = parse_idx(labels_content, 1, labels_path)
    if images.shape[1:] != (28, 28):
        height, width = images.shape[1:]
        raise damaged(images_path, f"holds images of {height} × {width} pixels, expected 28 × 28")
    if len(images) != len(labels):
        raise damaged(labels_path, f"holds {len(labels)} labels for {len(images)} images")
    if len(labels) and labels.max() > 9:
        raise damaged(labels_path, f"holds the label {int(labels.max())}, expected 0 to 9")
    if fault := image_file.fault(images_content):
        raise damaged(images_path, fault)
    if fault := label_file.fault(labels_content):
        raise damaged(labels_path, fault)
    return Examples(images.unsqueeze(1).float().div_(255), labels.long())


def _read(file: PublishedFile, find: Callable[[PublishedFile], Path]) -> tuple[Path, bytes]:
    try:
        path = find(file)
        return path, path.read_bytes()
    except OSError as error:
        raise DataError(f"{file.name} cannot be read ({error}): check the permissions of its folder") from error
