"""The service from the terminal: what `tacit model` and `tacit predict` print, and their exit code, good or bad."""

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from serving import close, inputs, model, until
from tacit.cli.main import main
from tacit.identity import Identity
from tacit.party import cluster_file
from tacit.party.local import LocalService

NET = """
import torch
from torch import nn

class Pixels(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(16, 3))

class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).real

def sized(width):
    return nn.Linear(width, 1)

def table():
    return {}
"""


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


def run(*arguments: str) -> Done:
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tacit", *arguments]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stopped:
            main()
    finally:
        sys.argv = before
    return Done(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


class Terminal:
    """A shell in a folder with files to ask about, and everybody's keys at hand."""

    def __init__(self, service: LocalService, folder: Path) -> None:
        self.service, self.folder = service, folder
        torch.manual_seed(1)
        self.pixels = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()

    def options(self, who: str) -> list[str]:
        return ["--key", f"{self.service.folder}/{who}.key", "--config", f"{self.service.folder}/cluster.toml"]

    def model(self, *arguments: str, who: str = "owner") -> Done:
        return run("model", *arguments, *self.options(who))

    def predict(self, name: str, file: str, *more: str, who: str = "clinic") -> Done:
        return run("predict", name, f"{self.folder}/{file}", *self.options(who), *more)

    def outputs(self, name: str, file: str) -> torch.Tensor:
        done = self.predict(name, file, "--json")
        assert (done.code, done.err) == (0, "")
        answer = json.loads(done.out)
        assert answer["model"] == name
        (output,) = answer["outputs"]
        return torch.tensor(output)

    def push(self, *more: str, who: str = "owner", factory: str = "Pixels", example: str = "1,4,4") -> Done:
        return self.model("push", f"{self.folder}/net.py:{factory}", *more, "--example", example, who=who)


@pytest.fixture(scope="module")
def terminal(service: LocalService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    folder = tmp_path_factory.mktemp("terminal")
    shell = Terminal(service, folder)
    (folder / "net.py").write_text(NET)
    save_file({f"1.{name}": value.data for name, value in shell.pixels[1].named_parameters()}, folder / "w.safetensors")
    save_file(nn.Linear(2, 2).state_dict(), folder / "other.safetensors")
    Identity.fresh().save(folder / "stranger.key")
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(picture).save(folder / "x.png")
    Image.fromarray(np.stack([picture] * 3, 2).repeat(5, 0).repeat(5, 1)).save(folder / "large.jpg", quality=95)
    np.save(folder / "x.npy", inputs(3).numpy())
    np.save(folder / "one.npy", inputs(1).double().numpy()[0])
    np.savetxt(folder / "x.csv", inputs(3).numpy(), delimiter=",")
    (folder / "excel.csv").write_text("\ufeff" + ",".join(map(str, inputs(1)[0].tolist())) + "\r\n", encoding="utf-8")
    np.save(folder / "pixels.npy", (picture / 255).astype(np.float32))
    np.save(folder / "wide.npy", np.zeros((2, 5)))
    np.save(folder / "nan.npy", np.full((1, 6), np.nan))
    np.save(folder / "large.npy", np.full((1, 6), 20000.0))
    np.save(folder / "complex.npy", np.zeros((1, 6), complex))
    (folder / "nan.csv").write_text("1,2,3,4,5,nan\n")
    (folder / "words.csv").write_text("a,b,c,d,e,f\n1,2,3,4,5,6\n")
    (folder / "ragged.csv").write_text("1,2,3,4,5,6\n1,2\n")
    (folder / "empty.csv").write_text("")
    for name in ("junk.png", "junk.npy", "x.txt"):
        (folder / name).write_bytes(b"nothing of the kind")
    done = shell.push(f"{folder}/w.safetensors", "--name", "pixels")
    assert (done.code, done.out) == (0, ""), done.err
    assert [line.split(",")[0] for line in done.err.splitlines()] == ["pushed pixels", "it is served"]
    yield shell
    done = shell.model("delete", "pixels")
    assert (done.code, done.err) == (0, "pixels is deleted at alice, bob and the provider\n")


def test_arrays_tables_and_pictures_are_answered_as_in_the_clear(terminal: Terminal) -> None:
    for file, given in (("x.npy", inputs(3)), ("x.csv", inputs(3)), ("one.npy", inputs(1)), ("excel.csv", inputs(1))):
        assert close(terminal.outputs("small", file), model()(given))
    picture = torch.from_numpy(np.load(terminal.folder / "pixels.npy"))[None, None]
    for file in ("x.png", "pixels.npy"):
        assert close(terminal.outputs("pixels", file), terminal.pixels(picture))
    # A larger picture in colours is scaled to the model's size; JPEG loses a little.
    assert torch.allclose(terminal.outputs("pixels", "large.jpg"), terminal.pixels(picture), atol=0.05)


def test_the_answer_as_a_table(terminal: Terminal) -> None:
    done = terminal.predict("small", "x.npy")
    assert done.code == 0
    rows = [line.split() for line in done.out.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["0", "1", "2"]
    assert [int(row[3]) for row in rows] == model()(inputs(3)).argmax(1).tolist()
    assert "known to this client alone" in done.out


SHAPE = "holds numbers of shape (2, 5): the model takes items of shape (6,), or of 6 numbers in a row, one or several"
TABLE = "is not a table of numbers with commas between them"
BAD_FILES = {
    "wide.npy": SHAPE,
    "nan.npy": "input holds NaN or infinity: only finite numbers can be encoded",
    "nan.csv": "input holds NaN or infinity: only finite numbers can be encoded",
    "large.npy": "input holds a value outside ±16384, the range at 16 fractional bits: rescale it",
    "complex.npy": "complex.npy holds complex numbers: give real ones",
    "junk.npy": "junk.npy is not a readable .npy array of numbers",
    "missing.npy": "there is no file",
    "missing.png": "there is no file",
    "words.csv": f"words.csv {TABLE}: could not convert string 'a' to float64",
    "ragged.csv": f"ragged.csv {TABLE}: the number of columns changed from 6 to 2",
    "empty.csv": "empty.csv holds no numbers: give at least one item",
    "x.txt": "x.txt is none of the files that can be asked about: .png, .jpg, .jpeg, .bmp, .npy, .csv",
    "x.png": "x.png is a picture, and the model takes items of shape (6,): give a .npy or a .csv",
}


@pytest.mark.parametrize("file", BAD_FILES)
def test_a_file_that_cannot_be_asked_about_is_refused_in_a_sentence(terminal: Terminal, file: str) -> None:
    refused(terminal.predict("small", file), BAD_FILES[file])


def refused(done: Done, why: str) -> None:
    """A mistake is one line on standard error, nothing on standard output, and exit code 2."""
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert why in done.err


def test_a_file_that_is_no_picture_is_refused(terminal: Terminal) -> None:
    refused(terminal.predict("pixels", "junk.png"), "junk.png is not a readable picture")


def test_who_may_not_ask_is_told_so(terminal: Terminal) -> None:
    refused(terminal.predict("nothing", "x.npy"), "model 'nothing' is not loaded: ask its owner to load it")
    refused(terminal.predict("small", "x.npy", who="outsider"), "cluster.toml does not let outsider ask model 'small'")
    refused(
        terminal.predict("small", "x.npy", who="owner"),
        "cluster.toml has an owner with this key and no client: it may ask no model",
    )
    config = ["--config", f"{terminal.service.folder}/cluster.toml"]
    key = ["--key", f"{terminal.folder}/stranger.key"]
    file = f"{terminal.folder}/x.npy"
    refused(run("predict", "small", file, *config, *key), "cluster.toml has no client with the key ed25519:")
    refused(run("predict", "small", file, *config, "--key", f"{terminal.folder}/no.key"), "no.key")
    refused(run("predict", "small", file, *key, "--config", f"{terminal.folder}/no.toml"), "no.toml cannot be read")
    refused(terminal.predict("small", "x.npy", "--timeout", "0"), "a timeout of 0 seconds: give a positive number")


def test_a_party_that_is_not_there_is_named(terminal: Terminal) -> None:
    cluster = terminal.service.cluster
    alice = msgspec.structs.replace(cluster.parties.alice, address="127.0.0.1:1")
    parties = msgspec.structs.replace(cluster.parties, alice=alice)
    path = terminal.folder / "elsewhere.toml"
    cluster_file.write(msgspec.structs.replace(cluster, parties=parties), path)
    key, file = f"{terminal.service.folder}/clinic.key", f"{terminal.folder}/x.npy"
    gone = "alice at 127.0.0.1:1 cannot be reached: Connection refused"
    refused(run("predict", "small", file, "--key", key, "--config", str(path)), gone)
    owner = f"{terminal.service.folder}/owner.key"
    refused(run("model", "list", "--key", owner, "--config", str(path)), gone)


def test_a_push_that_cannot_be_is_refused_before_anything_is_sent(terminal: Terminal) -> None:
    folder = terminal.folder
    weights = f"{folder}/w.safetensors"
    refused(terminal.model("push", "net.py", "--example", "6"), "give FILE.py:FACTORY")
    refused(terminal.push(factory="Missing"), "net.py has no function or class 'Missing' that makes a model")
    refused(terminal.push(factory="sized"), "cannot be called without arguments (missing a required argument: 'width')")
    refused(terminal.push(factory="table"), "makes a dict: give what makes a torch.nn.Module")
    refused(terminal.push(f"{folder}/other.safetensors"), "does not hold the weights of this Pixels")
    refused(terminal.push(f"{folder}/none.safetensors"), "none.safetensors is not a readable safetensors file")
    refused(terminal.push(f"{folder}/w.pt"), "is read by unpickling, which runs whatever is in it")
    refused(terminal.push(weights, example="4;4"), "give a .npy file, or the shape of an item such as 1,28,28")
    refused(terminal.push(weights, example="7"), "the model does not take inputs of shape (3, 7)")
    refused(terminal.push(weights, "--name", "two words"), "'two words' is no name")
    refused(terminal.push(factory="Spectrum", example="8"), "aten.")
    refused(terminal.push(weights, who="clinic"), "cluster.toml has no owner with the key ed25519:")
    refused(terminal.push(weights, "--name", "small", who="rival"), "the name 'small' belongs to another owner")
    listed = json.loads(terminal.model("list", "--json").out)
    assert all({one["model"] for one in models} == {"small", "pixels"} for models in listed.values())


def test_models_that_are_not_there_or_are_another_s(terminal: Terminal) -> None:
    out = f"{terminal.folder}/not-ours.safetensors"
    for command in (["pull"], ["load"], ["unload"], ["delete"]):
        name = [*command, "nothing", *([out] if command == ["pull"] else [])]
        refused(terminal.model(*name), "alice: there is no model 'nothing' here")
        name = [*command, "small", *([out] if command == ["pull"] else [])]
        refused(terminal.model(*name, who="rival"), "alice: the model 'small' belongs to another owner")
    assert not Path(out).exists()
    assert json.loads(terminal.model("list", "--json", who="rival").out) == {"alice": [], "bob": [], "provider": []}


def test_a_model_is_listed_pulled_unloaded_and_loaded(terminal: Terminal) -> None:
    listed = json.loads(terminal.model("list", "--json").out)
    (alice,) = [one for one in listed["alice"] if one["model"] == "pixels"]
    assert alice["served"]
    assert all(alice["tickets"].values())
    table = [line for line in terminal.model("list").out.splitlines() if "pixels" in line]
    assert len(table) == 1
    assert [cell.strip() for cell in table[0].strip("│").split("│")][1:4] == [
        alice["version"][:12], "alice, bob, provider", "yes",
    ]  # fmt: skip
    path = terminal.folder / "pulled.safetensors"
    done = terminal.model("pull", "pixels", str(path))
    assert (done.code, done.err) == (0, f"wrote {path}\n")
    assert path.stat().st_mode & 0o777 == 0o600
    for name, value in load_file(path).items():
        torch.testing.assert_close(value, terminal.pixels.state_dict()[name], atol=1e-6, rtol=0)
    refused(terminal.model("pull", "pixels", str(path)), "pulled.safetensors is there already: choose another name")
    refused(terminal.model("pull", "pixels", f"{terminal.folder}/no/x.safetensors"), "no weights can be written to")

    def served() -> bool:
        models = json.loads(terminal.model("list", "--json").out)
        return all(one["served"] for party in ("alice", "bob") for one in models[party] if one["model"] == "pixels")

    done = terminal.model("unload", "pixels")
    assert (done.code, done.err) == (0, "pixels is served no longer; the parties keep it\n")
    until(lambda: not served())
    refused(terminal.predict("pixels", "x.png"), "model 'pixels' is not loaded: ask its owner to load it")
    done = terminal.model("load", "pixels")
    assert (done.code, done.err) == (0, "pixels will be served as soon as the parties have it ready\n")
    until(served)
    assert terminal.predict("pixels", "x.png").code == 0
