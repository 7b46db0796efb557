"""A worker in a process of its own: the same pointers, over a connection."""

import copy
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch
from torch import Tensor, nn

import tacit.syft as sy
from links import plain_links
from tacit.errors import CodecError, InputError, PeerError
from tacit.identity import Identity, key_text
from tacit.party import dialing
from tacit.party.address import Address
from tacit.party.objects import RemoteWorker, functions, name_of, serve_objects_to
from tacit.party.transport import TOKEN_BYTES
from tacit.wire import Kind

X = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])
Started = tuple[subprocess.Popen[str], int, bytes]


def started() -> Started:
    token = secrets.token_bytes(TOKEN_BYTES)
    command = [sys.executable, "-W", "error", "-m", "tacit.party.objects", "bob"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdin.write(token.hex() + "\n")
    process.stdin.flush()
    return process, int(process.stdout.readline()), token


def ended(process: subprocess.Popen[str]) -> int:
    process.stdin.close()
    process.stdout.close()
    return process.wait(10)


@pytest.fixture(scope="module")
def bob() -> Iterator[RemoteWorker]:
    process, port, token = started()
    worker = RemoteWorker("bob", port, token)
    yield worker
    worker.close()
    assert ended(process) == 0


@pytest.fixture(autouse=True)
def hook() -> Iterator[sy.TorchHook]:
    hook = sy.TorchHook(torch)
    yield hook
    hook.unhook()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2 - 1 / (x + 4),
        lambda x: x[0, 1:] + x[..., :2].T.sum(1),
        lambda x: torch.cat([x, x.to(torch.float64)]).max(dim=0)[0],
        lambda x: torch.nn.functional.log_softmax(x.view(-1), 0, dtype=torch.float32),
        lambda x: torch.zeros_like(x).add_(x).mul_(3),
        lambda x: (x > 0).long(),
        lambda x: x > 0,
    ],
)
def test_functions_run_in_the_other_process(function: Callable[[Tensor], Tensor], bob: RemoteWorker) -> None:
    result = function(X.send(bob))
    assert isinstance(result, sy.PointerTensor)
    assert (result.shape, result.dtype, result.dim()) == (function(X).shape, function(X).dtype, function(X).dim())
    torch.testing.assert_close(result.get(), function(X))


def test_training_there_is_training_here(bob: RemoteWorker) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.0), nn.Linear(4, 1))
    there = copy.deepcopy(here)
    for model, data in ((here, X), (there, X.send(bob))):
        for optimizer in (
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
            torch.optim.Adam(model.parameters(), lr=0.1),
        ):
            for _ in range(3):
                if model is there:
                    model.send(bob)
                optimizer.zero_grad()
                model(data).pow(2).mean().backward()
                optimizer.step()
                if model is there:
                    model.get()
    torch.testing.assert_close(there.state_dict(), here.state_dict())
    assert torch.equal(there[0].weight.grad, here[0].weight.grad)


def test_a_module_is_copied_there_and_moves_on(bob: RemoteWorker) -> None:
    alice, model = sy.VirtualWorker(None, id="alice"), nn.Linear(3, 1)
    sent = model.copy().send(bob)
    twin = sent.copy()
    with torch.no_grad():
        sent.weight.mul_(2)
    sent.move(alice)
    assert (sent.weight.location, twin.weight.location) == (alice, bob)
    assert torch.equal(sent.get().weight, 2 * model.weight)
    assert torch.equal(twin.get().weight, model.weight)


def test_gradients_tags_and_copies(bob: RemoteWorker) -> None:
    pointer = X.clone().requires_grad_().tag("#x").send(bob)
    (pointer**2).sum().backward()
    twin = pointer.copy()
    [found] = bob.search("#x", str(pointer.id_at_location)) or bob.search("#x")[:1]
    assert found.location is bob
    for one in (twin, pointer):
        taken = one.get()
        assert torch.equal(taken.grad, 2 * X)
        assert taken.tags == {"#x"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, bob: x.tolist(), "would show a value"),
        (lambda x, bob: x.sum().item(), "would show a value"),
        (lambda x, bob: x + X, "another at me"),
        (lambda x, bob: x @ x, "bob could not do this: RuntimeError"),
        (lambda x, bob: x.fix_precision(), "cannot be sent to another process"),
        (lambda x, bob: [x.get(), x.get()], "not at bob any more"),
        (lambda x, bob: x.send(bob), "which holds plain tensors"),
        (lambda x, bob: X.clone().private_tensor(["carol"]).send(bob).sum().get(), "does not hand"),
        (lambda x, bob: bob.clear_objects(), "another process"),
        (lambda x, bob: bob._ask("call", "os.system", ["true"], {}, False, True), "no such call"),
        (lambda x, bob: bob._ask("hold", ["load", False, [], None, None]), "tensors of load came"),
        (lambda x, bob: bob._ask("give"), "could not do this: TypeError"),
    ],
)
def test_refusals(call: Callable[[Tensor, RemoteWorker], object], message: str, bob: RemoteWorker) -> None:
    with pytest.raises((InputError, CodecError), match=message):
        call(X.send(bob), bob)
    assert torch.equal(X.send(bob).get(), X)  # and the two are still in step


def test_only_functions_that_pytorch_lists_have_a_name() -> None:
    assert name_of(torch.add) == "torch.add"
    assert functions()[name_of(Tensor.grad.__set__)] == Tensor.grad.__set__
    with pytest.raises(InputError, match="cannot be sent"):
        name_of(print)


def test_strangers_are_refused_and_a_worker_that_ended_is_gone() -> None:
    process, port, token = started()
    worker = RemoteWorker("bob", port, token)
    pointer = X.send(worker)
    process.kill()
    with pytest.raises(PeerError, match="bob"):
        pointer.sum()
    ended(process)
    worker.close()
    process, port, _ = started()
    with pytest.raises(PeerError):
        RemoteWorker("bob", port, secrets.token_bytes(TOKEN_BYTES))
    assert ended(process) != 0


class TestOverTls:
    """A worker on another machine: here a thread, which has nothing of its program but a connection."""

    WORKER, PROGRAM, MALLORY = (Identity(bytes([number]) * 32) for number in (1, 2, 3))

    @pytest.fixture
    def address(self) -> Iterator[str]:
        with dialing.listen(Address("127.0.0.1", 0)) as listener:
            pins = {"a program": self.PROGRAM.public}
            worker = sy.VirtualWorker(id="bob")
            thread = threading.Thread(target=serve_objects_to, args=(worker, listener, self.WORKER, pins))
            thread.start()
            yield f"127.0.0.1:{listener.getsockname()[1]}"
            thread.join(20)
            assert not thread.is_alive()

    def test_strangers_are_refused_and_the_program_is_served(self, address: str) -> None:
        stranger = RemoteWorker.dial("bob", address, self.MALLORY, key_text(self.WORKER.public))
        with pytest.raises(PeerError, match="bob refused this side's key"):
            X.send(stranger)
        stranger.close()
        with pytest.raises(PeerError, match="does not hold the key"):
            RemoteWorker.dial("bob", address, self.PROGRAM, key_text(self.MALLORY.public))
        worker = RemoteWorker.dial("bob", address, self.PROGRAM, key_text(self.WORKER.public))
        torch.testing.assert_close((X.send(worker) * 2).get(), X * 2)
        worker.close()

    @pytest.mark.parametrize(
        ("kind", "body", "error"),
        [
            (Kind.REPLY, b"\xc1", CodecError),
            (Kind.ERROR, b"\xc1", CodecError),
            (Kind.ERROR, msgspec.msgpack.encode([1, 2]), CodecError),
            (Kind.ERROR, msgspec.msgpack.encode(["__loader__", "x"]), InputError),
            (Kind.ERROR, msgspec.msgpack.encode(["PeerError", "x"]), PeerError),
        ],
    )
    def test_answers_that_do_not_parse(self, kind: Kind, body: bytes, error: type[Exception]) -> None:
        ours, theirs = plain_links()
        worker = RemoteWorker.__new__(RemoteWorker)
        worker._begin("bob", ours)
        theirs.send(kind, body=body)
        with pytest.raises(error):
            worker.hold(X)
        worker.close()
        theirs.close()
