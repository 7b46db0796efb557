import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tacit.data import mnist as mnist_module
from tacit.data.download import fetch
from tacit.data.mnist import load_mnist
from tacit.data.published import PublishedFile
from tacit.errors import DataError

CONTENT = bytes(range(256)) * 1000
FILE = PublishedFile("file.gz", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class Handler(BaseHTTPRequestHandler):
    bodies: ClassVar[dict[str, bytes]] = {
        "/good/file.gz": CONTENT,
        "/flipped/file.gz": CONTENT[:-1] + b"\0",
        "/short/file.gz": CONTENT[:-1],
        "/endless/file.gz": CONTENT * 20,
    }

    def do_GET(self) -> None:
        body = self.bodies.get(self.path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        try:
            self.wfile.write(body or b"")
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def mirror() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_fetches_and_reports_progress(mirror: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = fetch(FILE, tmp_path / "new" / "folder", [mirror + "good/"], lambda *step: seen.append(step))
    assert path == tmp_path / "new" / "folder" / "file.gz"
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file.gz"]
    assert seen[-1] == ("file.gz", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted({done for _, done, _ in seen})


def test_falls_back_to_the_next_mirror(mirror: str, tmp_path: Path) -> None:
    path = fetch(FILE, tmp_path, [mirror + "absent/", mirror + "flipped/", mirror + "good/"])
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("folder", ["flipped/", "short/", "endless/"])
def test_wrong_content_leaves_nothing_behind(mirror: str, tmp_path: Path, folder: str) -> None:
    with pytest.raises(DataError, match=rf"SHA-256 expected {FILE.sha256}, found [0-9a-f]{{64}}") as caught:
        fetch(FILE, tmp_path, [mirror + folder])
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_stops_reading_a_body_that_is_too_long(mirror: str, tmp_path: Path) -> None:
    seen: list[int] = []
    with pytest.raises(DataError):
        fetch(FILE, tmp_path, [mirror + "endless/"], lambda _name, done, _size: seen.append(done))
    assert seen[-1] == len(CONTENT) + 1


def test_unreachable_mirrors_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:1/: .*refused.*check the network connection"):
        fetch(FILE, tmp_path, ["http://127.0.0.1:1/"])


def test_a_folder_that_cannot_be_written(mirror: str, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(DataError, match="cannot be written"):
        fetch(FILE, tmp_path / "occupied", [mirror + "good/"])


def test_an_interrupted_write_leaves_nothing_behind(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(FILE, tmp_path, [mirror + "good/"])
    assert list(tmp_path.iterdir()) == []


def test_load_mnist_downloads_into_the_cache(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_mnist: dict[str, bytes]
) -> None:
    monkeypatch.delenv("TACIT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Handler, "bodies", {f"/mnist/{name}": content for name, content in tiny_mnist.items()})
    with pytest.raises(DataError, match="downloading is off"):
        load_mnist(download=False)
    dataset = load_mnist(mirrors=[mirror + "mnist/"])
    assert (len(dataset.train), len(dataset.test)) == (6, 4)
    assert sorted(path.name for path in (tmp_path / "tacit" / "mnist").iterdir()) == sorted(tiny_mnist)
    monkeypatch.setattr(Handler, "bodies", {})
    assert len(load_mnist(mirrors=[mirror + "mnist/"]).train) == 6


def test_the_public_mirrors_are_reached_over_tls() -> None:
    assert all(url.startswith("https://") and url.endswith("/") for url in mnist_module.MIRRORS)
