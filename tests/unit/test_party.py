"""The plain socket driver: links, the driver of protocols, programs as bytes, and the three processes."""

import os
import signal
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from links import Links, both
from tacit.errors import CodecError, CorrelationError, InputError, PeerError, UnsupportedOperator
from tacit.mpc import sign
from tacit.mpc.correlation import Part, Party, Provider
from tacit.mpc.linear import MatMul, Product
from tacit.mpc.lockstep import Meter, Trio, plan
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Enter, Open, Role, Take
from tacit.party import calls
from tacit.party.driver import Pool, drive
from tacit.party.launch import LocalProcesses
from tacit.party.programs import Program, decode_program, encode_program
from tacit.party.trainer import ProcessTrainer
from tacit.party.training import TrainingProgram, decode_training_program, encode_training_program
from tacit.party.transport import accept, connect, listen
from tacit.program.lowering import Context
from tacit.program.lowering.backward import PARAMETER_BITS
from tacit.program.optimizers import Adam, Sgd
from tacit.program.rewrite import Model, simplify
from tacit.program.step import StepProgram
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg
from tacit.trace import Graph, Node, Ref, trace

TOKEN = bytes(range(16))


@pytest.fixture
def links() -> Iterator[Links]:
    """alice's link to bob and bob's to alice."""
    with listen() as listener:
        port = listener.getsockname()[1]
        alice, bob = both(
            lambda: accept(listener, "alice", {"bob"}, TOKEN, patience=20.0),
            lambda: connect(port, "bob", "alice", TOKEN, patience=20.0),
        )
    yield alice, bob
    alice.close()
    bob.close()


@pytest.mark.parametrize(("name", "token"), [("mallory", TOKEN), ("bob", bytes(16))])
def test_strangers_are_refused(name: str, token: bytes) -> None:
    with listen() as listener:
        port = listener.getsockname()[1]
        refused, refusal = both(
            lambda: accept(listener, "alice", {"bob"}, TOKEN),
            lambda: connect(port, name, "alice", token),
        )
    assert isinstance(refused, PeerError)
    assert "not of this session" in str(refused)
    assert isinstance(refusal, PeerError)


def parties(seed: int) -> tuple[Provider, tuple[Party, Party]]:
    """As `Trio` makes them from the same seed."""
    root = Prg(seed.to_bytes(16, "big"))
    alice, bob = root.derive("alice"), root.derive("bob")
    return Provider(alice, bob, root.derive("provider")), (Party(Role.ALICE, alice), Party(Role.BOB, bob))


def test_driven_over_a_link_a_protocol_gives_the_shares_that_it_gives_in_lockstep(links: Links) -> None:
    z = share(Prg(bytes(16)).words((40, 3)) >> 24, 2 * FRACTION_BITS, Prg(bytes(16)))
    expected = Trio(Prg((5).to_bytes(16, "big"))).run(sign.relu(z[0]), sign.relu(z[1]))
    planned = Meter()
    plan(sign.relu(Share(torch.empty((40, 3), dtype=torch.int64, device="meta"), z[0].scale, Role.ALICE)), planned)
    provider, pair = parties(5)
    pools = Pool(), Pool()
    for correlation in planned.correlations:
        number, corrections = provider.deal(correlation)
        pools[0].put(correlation, pair[0].receive(number, correlation, {}))
        pools[1].put(correlation, pair[1].receive(number, correlation, corrections))
    meters = Meter(), Meter()
    got = both(*(lambda i=i: drive(sign.relu(z[i]), pools[i], links[i], meters[i]) for i in range(2)))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.words, other.words)
    for meter, link in zip(meters, links, strict=True):
        assert (meter.rounds, meter.bytes_online) == (planned.rounds, planned.bytes_online)
        assert link.bytes_opened == planned.bytes_online
        assert meter.correlations == planned.correlations
    assert not len(pools[0])


def test_the_pool_hands_out_in_order_once_and_nothing_after_a_failure(links: Links) -> None:
    first, second = (Product(MatMul(), (n, 2), (2, 3)) for n in (4, 5))
    pool = Pool()
    with pytest.raises(CorrelationError, match="deal first"):
        pool.take(first)
    pool.put(first, Part())
    pool.put(second, Part())
    with pytest.raises(CorrelationError, match="thrown away"):
        pool.take(second)
    assert not len(pool)

    def fails() -> Any:
        yield Enter("layer")
        yield Take(first)
        links[1].close()
        yield Open(torch.zeros(3, dtype=torch.int64))

    pool.put(first, Part())
    pool.put(second, Part())
    with pytest.raises(PeerError):
        drive(fails(), pool, links[0], Meter())
    assert not len(pool)


class Small(nn.Module):
    """Every kind of argument that a graph can hold, in little time."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.convolution(x)), 2)
        return torch.cat([self.linear(x.flatten(1)) * 0.5, x.mean((2, 3))], 1)


def small_program() -> tuple[Small, Program, dict[str, tuple[Share, Share]]]:
    torch.manual_seed(0)
    model = Small().eval()
    owned = simplify(Model(*trace(model, (torch.zeros(2, 1, 6, 6),))))
    shapes = {name: tuple(value.shape) for name, value in owned.state.items()}
    program = Program(owned.graph, shapes, ((2, 1, 6, 6),), Context(), first_number=4)
    prg = Prg.fresh()
    return model, program, {n: share(encode(v), FRACTION_BITS, prg) for n, v in owned.state.items()}


def test_a_program_survives_its_encoding_but_for_where_it_came_from() -> None:
    _, program, _ = small_program()
    again = decode_program(encode_program(program))
    assert (again.state, again.inputs, again.context) == (program.state, program.inputs, program.context)
    assert again.first_number == 4
    assert (again.graph.inputs, again.graph.outputs) == (program.graph.inputs, program.graph.outputs)
    assert set(again.graph.state) == set(program.graph.state)
    for one, other in zip(again.graph.nodes, program.graph.nodes, strict=True):
        assert [getattr(one, n) for n in ("name", "operator", "kwargs", "shape", "refs")] == [
            getattr(other, n) for n in ("name", "operator", "kwargs", "shape", "refs")
        ]
        assert list(one.args) == list(other.args)
        assert (one.layer, one.source) == ("", "")
    assert again.cost().correlations == program.cost().correlations
    assert again.load_correlations() == program.load_correlations()
    # A new field of a node must be sent, or be left out on purpose.
    assert {field.name for field in fields(Node)} == {"name", "operator", "args", "kwargs", "shape", "layer", "source"}


@pytest.mark.parametrize("cut", [0, 1, 50])
def test_a_program_that_does_not_parse_is_refused(cut: int) -> None:
    data = encode_program(small_program()[1])
    for broken in (data[:cut], data[: -1 - cut], data + b"\x00"):
        with pytest.raises(CodecError):
            decode_program(broken)


def test_unknown_settings_and_arguments_of_a_program_are_refused() -> None:
    packed = msgspec.msgpack.decode(encode_program(small_program()[1]))
    settings = list(packed)
    settings[5] = settings[5] | {"unheard_of": 1}
    with pytest.raises(CodecError, match="settings"):
        decode_program(msgspec.msgpack.encode(settings))
    for argument in ({"code": "x"}, {"dtype": "torch.Tensor"}, {"ref": 3}, {"ref": "x", "dtype": "torch.int64"}):
        packed[2][0][2][0] = argument
        with pytest.raises(CodecError, match="argument"):
            decode_program(msgspec.msgpack.encode(packed))


def node(name: str, operator: str, *args: Any, shape: tuple[int, ...] = (2, 3)) -> Node:
    return Node(name, operator, args, {}, shape, "secret.layer", "secret.py:1: line")


def hand_written_step(**changes: Any) -> TrainingProgram:
    """w ← number·w² + constant, with every kind of thing that a training step's encoding holds."""
    view = (("transpose", (0, 1)), ("reshape", ((2, 3),)))
    nodes = (
        node("w_masked", "tacit.mask", Ref("w"), "w_masked", 16),
        node("square", "tacit.multiply", Ref("w_masked"), view, Ref("w_masked"), view),
        node("weighed", "tacit.weigh", Ref("square"), Ref("number")),
        node("biased", "aten.add.Tensor", Ref("weighed"), Ref("constant")),
        node("new", "tacit.truncate", Ref("biased"), PARAMETER_BITS),
        node("loss", "aten.sum.default", Ref("x"), shape=()),
    )
    inputs = ("w", "x", "y", "number", "constant")
    graph = changes.pop("graph", Graph(inputs, (), nodes, ("new", "loss")))
    constant = changes.pop("constant", torch.arange(6, dtype=torch.float32).reshape(3, 2).T)
    step = StepProgram(graph, (constant,), labels_sum_to_one=True)
    settings = {"state": {"w": (2, 3)}, "batch": ((2,), (2, 1)), "numbers": 1, "context": Context(chunks=4)}
    return TrainingProgram(step, **(settings | changes))


def test_a_training_step_survives_its_encoding_but_for_where_it_came_from() -> None:
    program = hand_written_step()
    again = decode_training_program(encode_training_program(program))
    assert [n.args for n in again.step.graph.nodes] == [n.args for n in program.step.graph.nodes]
    assert [n.operator for n in again.step.graph.nodes] == [n.operator for n in program.step.graph.nodes]
    assert {(n.layer, n.source) for n in again.step.graph.nodes} == {("", "")}
    assert b"secret" not in encode_training_program(program)
    (constant,), (sent,) = again.step.constants, program.step.constants
    assert constant.dtype == sent.dtype
    assert torch.equal(constant, sent)
    assert (again.state, again.batch, again.numbers) == (program.state, program.batch, program.numbers)
    assert (again.context, again.step.labels_sum_to_one) == (program.context, True)
    assert again.updated == ("w",)
    assert again.cost().correlations == program.cost().correlations
    assert len(set(again.cost().correlations)) == len(again.cost().correlations)


def test_a_training_step_that_does_not_parse_or_hold_together_is_refused() -> None:
    data = encode_training_program(hand_written_step())
    for broken in (b"", data[:40], data[:-1], data + b"\x00", encode_program(small_program()[1])):
        with pytest.raises(CodecError):
            decode_training_program(broken)
    packed = msgspec.msgpack.decode(data)
    inputs, nodes, outputs, (constant,) = packed[:4]

    def with_node(position: int, field: int, value: Any) -> list[Any]:
        return [[*n[:field], value, *n[field + 1 :]] if i == position else n for i, n in enumerate(nodes)]

    changes: list[tuple[int, Any, str]] = [
        (1, with_node(0, 1, "aten.system.default"), "operator that this side does not know"),
        (1, with_node(0, 0, "w"), "a name is used twice"),
        (1, with_node(0, 2, [{"ref": "new"}, "w_masked", 16]), "a node takes what none before it gives"),
        (0, ["w", "w", *inputs[2:]], "gives one name to two"),
        (2, [*outputs, "nothing"], "returns something that no node"),
        (2, [], "a part of its state and the loss"),
        (3, [constant, constant], "one input for each tensor"),
        (3, [["torch.Tensor", *constant[1:]]], "a dtype or shape"),
        (3, [[constant[0], [-2, -3], constant[2]]], "a dtype or shape"),
        (3, [[*constant[:2], constant[2][:-1]]], "another number of bytes"),
        (5, [["w", [2, 3]], ["w", [2, 3]]], "one input for each tensor"),
        (7, -1, "one input for each tensor"),
        (8, packed[8] | {"unheard_of": 1}, "settings"),
    ]
    for position, value, reason in changes:
        changed = [*packed[:position], value, *packed[position + 1 :]]
        with pytest.raises(CodecError, match=reason):
            decode_training_program(msgspec.msgpack.encode(changed))


def test_a_training_step_that_does_not_fit_its_shapes_is_refused_before_anything_is_dealt() -> None:
    with pytest.raises(InputError, match="does not fit its shapes"):
        hand_written_step(state={"w": (2, 4)}).cost()
    graph = hand_written_step().step.graph
    for outputs in (("square", "loss"), ("loss", "loss"), ("w_masked", "loss"), ("new", "w_masked")):
        with pytest.raises(InputError, match="other shapes or scales"):
            hand_written_step(graph=Graph(graph.inputs, (), graph.nodes, outputs)).cost()
    unviewed = Node("square", "tacit.multiply", (Ref("w_masked"), (("storage", ()),), Ref("w_masked"), ()), {})
    nodes = tuple(unviewed if one.name == "square" else one for one in graph.nodes)
    with pytest.raises(UnsupportedOperator, match="'storage' is not a view"):
        hand_written_step(graph=Graph(graph.inputs, (), nodes, graph.outputs)).cost()


def test_a_training_step_runs_only_on_what_it_was_made_for() -> None:
    program, prg = hand_written_step(), Prg.fresh()
    w, x, y = (share(prg.words(shape), 16, prg)[0] for shape in ((2, 3), (2,), (2, 1)))
    for state, batch, numbers, reason in (
        ({}, [x, y], [0.5], "state kept"),
        ({"v": w}, [x, y], [0.5], "state kept"),
        ({"w": x}, [x, y], [0.5], "state kept"),
        ({"w": w}, [y, x], [0.5], "batch"),
        ({"w": w}, [x], [0.5], "batch"),
        ({"w": w}, [x, y], [], "takes 1 numbers"),
        ({"w": w}, [x, y], [1.5], "takes 1 numbers"),
        ({"w": w}, [x, y], [float("nan")], "takes 1 numbers"),
    ):
        with pytest.raises(InputError, match=reason):
            program.run(state, batch, numbers)
    program.run({"w": w}, [x, y], [0.5]).close()


def test_calls_are_told_apart_and_checked() -> None:
    for call in (
        calls.Join({"alice": 1}),
        calls.Deal(),
        calls.Run([16], True),
        calls.Load(["w"], [16]),
        calls.Step([0.5]),
    ):
        assert calls.decode_call(calls.encode(call)) == call
        with pytest.raises(CodecError):
            calls.decode_answer(calls.encode(call))
    for data in (b"", b"\x80", calls.encode(calls.Deal()) + b"\x00", calls.encode(calls.Join({"alice": 70000}))):
        with pytest.raises(CodecError):
            calls.decode_call(data)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_three_processes_predict_and_the_death_of_one_is_named() -> None:
    model, program, state = small_program()
    prg = Prg.fresh()
    x = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)
    with LocalProcesses() as processes:
        pids = [processes.pid(name) for name in ("alice", "bob", "provider")]
        planned = processes.install(program)
        cost = program.cost()
        assert (planned.rounds, planned.bytes_online, planned.bytes_dealt) == (
            cost.rounds,
            cost.bytes_online,
            cost.bytes_dealt,
        )
        processes.load(state)
        for batch in (x, x.flip(0)):
            assert processes.deal().nbytes == planned.bytes_dealt
            outcome = processes.run([share(encode(batch), FRACTION_BITS, prg)], by_layer=True)
            ((alice, bob),) = outcome.outputs
            with torch.no_grad():
                expected = model(batch)
            # Each of two truncated layers is within a unit, and a unit grows through 8 weights below 1.
            assert (reconstruct(alice, bob) - expected).abs().max() < 32 * 2.0**-16
            for party in (outcome.alice, outcome.bob):
                assert (party.rounds, party.bytes_online) == (planned.rounds, planned.bytes_online)
                assert party.layers.keys() >= {"convolution"}
        assert all(peak > 10 for peak in processes.peak_rss_mb().values())
        processes.deal()
        os.kill(processes.pid("bob"), signal.SIGKILL)
        with pytest.raises(PeerError, match="bob's process has ended with exit code -9"):
            processes.run([share(encode(x), FRACTION_BITS, prg)])
    assert all(map(gone, pids))


def test_no_process_is_left_behind_by_an_interrupt_or_a_failed_call() -> None:
    _, program, state = small_program()
    pids = []

    def interrupted() -> None:
        with LocalProcesses() as processes:
            pids.extend(processes.pid(name) for name in ("alice", "bob", "provider"))
            processes.install(program)
            processes.load(state)
            with pytest.raises(PeerError, match=r"(alice|bob): no dealt correlation is left .*deal first"):
                processes.run([share(torch.zeros(2, 1, 6, 6, dtype=torch.int64), FRACTION_BITS, Prg.fresh())])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(map(gone, pids))


def trained_in_plaintext(model: nn.Module, optimizer: Any, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Take the steps; the loss of the last one."""
    for inputs, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_three_processes_train_as_plaintext_does() -> None:
    torch.manual_seed(1)
    model = Small()
    inputs, labels = torch.linspace(-1, 1, 5 * 36).reshape(5, 1, 6, 6), torch.tensor([0, 1, 2, 3, 4])
    batches = [(inputs[:3], labels[:3]), (inputs[2:], labels[2:]), (inputs, labels)]
    with LocalProcesses() as processes:
        trainer = ProcessTrainer(processes, model, optimizer=Sgd(0.1, momentum=0.5))
        shape = (3, 1, 6, 6)
        planned = trainer.install(shape)
        for _ in range(2):  # two steps ahead
            assert trainer.deal(shape).nbytes == planned.bytes_dealt
        with pytest.raises(InputError, match="2 steps were dealt for batches of another shape"):
            trainer.step(*batches[2])
        for bad in ((inputs[:3], torch.tensor([0, 1, 5])), (inputs[:0], labels[:0]), (inputs[:3], labels[:2])):
            with pytest.raises(InputError):
                trainer.step(*bad)
        for batch in batches[:2]:
            outcome = trainer.step(*batch, by_layer=True)
            assert outcome.outputs == ()
            for party in (outcome.alice, outcome.bob):
                assert (party.rounds, party.bytes_online, party.scales) == (planned.rounds, planned.bytes_online, [])
                assert party.layers.keys() & trainer.operators(shape).keys()
        trainer.step(*batches[2])  # of another shape, dealt on the spot
        plain = Small()
        plain.load_state_dict(model.state_dict())
        loss = trained_in_plaintext(plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5), batches)
        # Units of 2^-16 in activations and their gradients, over windows of 16 positions and three steps.
        assert abs(trainer.loss() - loss) < 2.0**-10
        for ours, theirs in zip(trainer.reveal().parameters(), plain.parameters(), strict=True):
            assert (ours - theirs).abs().max() < 2.0**-10
        assert repr(trainer) == "ProcessTrainer(3 steps, shared by alice and bob)"

        # The same processes go on with another model, whose optimizer takes public numbers.
        linear = nn.Linear(4, 3)
        adam = ProcessTrainer(processes, linear, optimizer=Adam(0.1, eps=2.0**-8))
        pairs = [(torch.eye(4), torch.tensor([0, 1, 2, 0]))] * 2
        for pair in pairs:
            adam.step(*pair)
        plain_linear = nn.Linear(4, 3)
        plain_linear.load_state_dict(linear.state_dict())
        trained_in_plaintext(plain_linear, torch.optim.Adam(plain_linear.parameters(), lr=0.1, eps=2.0**-8), pairs)
        # Epsilon lies under the root here: a gradient of 0.05 or more moves a weight by 1% of the rate less.
        for ours, theirs in zip(adam.reveal().parameters(), plain_linear.parameters(), strict=True):
            assert (ours - theirs).abs().max() < 0.02
        with pytest.raises(PeerError, match=r"(alice|bob) has a training step where a model is needed"):
            processes.run([share(torch.zeros(2, 1, 6, 6, dtype=torch.int64), FRACTION_BITS, Prg.fresh())])
