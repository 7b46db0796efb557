"""A pushed model: what each of the three is sent, how it lies on a disk, and what comes of bytes from elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from tacit.cluster import cluster
from tacit.errors import CodecError, CorrelationError, DataError, InputError, PeerError, RangeError, UnsupportedOperator
from tacit.identity import Identity, key_text
from tacit.mpc.lockstep import Trio
from tacit.mpc.shares import Share, reconstruct, share
from tacit.mpc.steps import Role
from tacit.party.dealing import DealtModel
from tacit.party.loaded import LoadedModel
from tacit.party.models import ModelPart, pack, unpack
from tacit.party.push import Push, prepare, restore
from tacit.party.vault import Vault, require_owner
from tacit.program.lowering import Context
from tacit.program.network import NETWORKS
from tacit.ring.fixed_point import FRACTION_BITS, encode
from tacit.ring.prg import Prg

OWNER, STRANGER = (key_text(Identity(bytes([number]) * 32).public) for number in (1, 2))
KEY = bytes(range(32))


class Small(nn.Module):
    """Convolution, batch norm, pooling, a linear layer and a product with a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.linear = nn.Linear(8, 3)
        self.factor = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.convolution(x))), 2)
        return self.linear(x.flatten(1)) * self.factor


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def pushed() -> Push:
    return prepare(small(), [torch.zeros(1, 1, 6, 6)], name="small", owner=OWNER, batch_sizes=[4, 1])


def sent(part: ModelPart, role: str | None = None) -> ModelPart:
    body, tensors = pack(part)
    return unpack(body, [tensor.clone() for tensor in tensors], role or part.role)


def predict(push: Push, batch: int, inputs: Tensor) -> Tensor:
    """A run whose tickets come from the provider's part alone, in lockstep."""
    parties = LoadedModel(sent(push.alice)), LoadedModel(sent(push.bob))
    draw = DealtModel(sent(push.provider)).draw(batch)
    corrections = [tensor for tensors in draw.corrections for tensor in tensors]
    pools = parties[0].expand(batch, draw.alice, ()), parties[1].expand(batch, draw.bob, corrections)
    shares = share(encode(inputs), FRACTION_BITS, Prg.fresh())
    dealt = Trio().deal([])
    for correlation in parties[0].cost(batch).correlations:
        dealt.append((correlation, pools[0].take(correlation), pools[1].take(correlation)))
    (one,), (other,) = Trio().run(parties[0].run(batch, [shares[0]]), parties[1].run(batch, [shares[1]]), None, dealt)
    return reconstruct(one, other)


def test_parts_that_three_received_predict_as_the_model_does(pushed: Push) -> None:
    for batch in (1, 4):
        inputs = Prg(bytes(16)).words((batch, 1, 6, 6)).double() * 2.0**-62
        expected = small()(inputs.float())
        assert (predict(pushed, batch, inputs) - expected).abs().max() < 2e-3


def test_each_is_sent_its_own_part_and_all_the_same_description(pushed: Push) -> None:
    assert pushed.alice.description == pushed.bob.description == pushed.provider.description
    assert pushed.alice.digest == pushed.digest
    assert (pushed.alice.name, pushed.alice.owner, pushed.alice.batch_sizes) == ("small", OWNER, (1, 4))
    assert (pushed.alice.inputs[0].item_shape, pushed.alice.inputs[0].whole) == ((1, 6, 6), False)
    assert not pushed.provider.variants
    again = prepare(small(), [torch.zeros(1, 1, 6, 6)], name="small", owner=OWNER, batch_sizes=[1, 4])
    assert again.digest != pushed.digest, "every push has masks of its own"
    for name, difference in pushed.alice.variants[0].differences.items():
        assert torch.equal(difference, pushed.bob.variants[0].differences[name])
        assert not torch.equal(difference, again.alice.variants[0].differences[name])
    with pytest.raises(CodecError, match="meant for alice"):
        sent(pushed.alice, "bob")
    assert repr(pushed.alice) == f"ModelPart(small, {pushed.digest[:12]}…, alice's)"


def test_a_party_s_part_says_nothing_of_the_weights(pushed: Push) -> None:
    weights = {int(word) for value in small().state_dict().values() for word in encode(value).flatten()} - {0}
    for part in (pushed.alice, pushed.bob):
        held = [value for one in part.variants for value in (*one.state.values(), *one.differences.values())]
        held += [one.words for one in part.kept.values()]
        assert sum(value.numel() for value in held) > 50
        assert weights.isdisjoint(int(word) for value in held for word in value.flatten())


def test_the_owner_pulls_what_was_pushed(pushed: Push) -> None:
    weights = restore(sent(pushed.alice), sent(pushed.bob))
    original = small().state_dict()
    assert weights.keys() == original.keys()
    for key, value in original.items():
        assert weights[key].dtype == value.dtype
        assert (weights[key].double() - value.double()).abs().max() <= 2.0**-33
    small().load_state_dict(weights)
    other = prepare(nn.Linear(3, 2), [torch.zeros(1, 3)], name="l", owner=OWNER, batch_sizes=[1])
    for pair in ((pushed.bob, pushed.alice), (pushed.alice, other.bob), (pushed.alice, pushed.provider)):
        with pytest.raises(PeerError, match="different models"):
            restore(*pair)


def test_counters_of_a_long_training_are_no_weights() -> None:
    model = small()
    model.norm.num_batches_tracked.fill_(10**9)
    push = prepare(model, [torch.zeros(1, 1, 6, 6)], name="m", owner=OWNER, batch_sizes=[1])
    assert int(restore(push.alice, push.bob)["norm.num_batches_tracked"]) == 10**9
    with cluster() as parties:
        assert parties.encrypt(model, torch.zeros(1, 1, 6, 6)).cost().rounds


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


class Hidden(nn.Module):
    """Rows depend on each other through an attention over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.T, 1) @ x


@pytest.mark.parametrize(
    ("model", "why"), [(Mixing(), "other clients"), (Sums(), "one row"), (Hidden(), "other clients")]
)
def test_a_model_that_would_mix_clients_is_refused(model: nn.Module, why: str) -> None:
    with pytest.raises(InputError, match=why):
        prepare(model, [torch.zeros(1, 3)], name="m", owner=OWNER, batch_sizes=[1, 8])


def test_alone_in_its_batch_a_row_may_meet_itself() -> None:
    push = prepare(Mixing(), [torch.zeros(1, 3)], name="m", owner=OWNER, batch_sizes=[1])
    assert predict(push, 1, torch.ones(1, 3)).abs().max() < 1e-3


def test_what_cannot_be_pushed_is_refused_by_name(pushed: Push) -> None:
    settings: dict[str, Any] = {"name": "m", "owner": OWNER, "batch_sizes": [1]}
    example = [torch.zeros(1, 3)]
    with pytest.raises(UnsupportedOperator, match="fft"):
        prepare(Fft(), example, **settings)
    with pytest.raises(InputError, match="is no name"):
        prepare(nn.ReLU(), example, **settings | {"name": "../m"})
    for sizes in ([], [0, 1]):
        with pytest.raises(InputError, match="batch sizes"):
            prepare(nn.ReLU(), example, **settings | {"batch_sizes": sizes})
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(RangeError, match="weight of m"):
        prepare(broken, example, **settings)
    with pytest.raises(InputError, match="not of 3"):
        LoadedModel(pushed.alice).cost(3)


class Fft(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


class ShapedConstant(nn.Module):
    """Its simplified state follows the batch size: weights of another shape for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.expand(x.shape[0], 3).contiguous()


def test_batch_sizes_with_other_constants_have_other_masks() -> None:
    push = prepare(ShapedConstant(), [torch.zeros(1, 3)], name="m", owner=OWNER, batch_sizes=[1, 2])
    assert len(push.alice.variants) == 2
    one, two = (next(iter(variant.differences.values())) for variant in push.alice.variants)
    assert not torch.equal(one[0], two[0]), "the same weight under the same mask, but for a constant, would be a leak"
    for batch in (1, 2):
        assert (predict(push, batch, torch.ones(batch, 3)) - torch.tensor([1.0, 2.0, 3.0])).abs().max() < 1e-3


def test_the_network_decides_about_the_plan() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2))
    rounds = []
    for network in (None, NETWORKS["wan"]):
        push = prepare(
            model,
            [torch.zeros(1, 1, 6, 6)],
            name="m",
            owner=OWNER,
            batch_sizes=[1],
            context=Context(network=network),
        )
        rounds.append(LoadedModel(sent(push.bob)).cost(1).rounds)
    assert rounds[1] < rounds[0], "on a slow network the planner spends bytes to save rounds"


def test_tickets_of_another_batch_size_are_refused(pushed: Push) -> None:
    bob, dealt = LoadedModel(pushed.bob), DealtModel(pushed.provider)
    draw = dealt.draw(4)
    corrections = [tensor for tensors in draw.corrections for tensor in tensors]
    for wrong in (corrections[:-1], [*corrections, corrections[0]], corrections[::-1], []):
        with pytest.raises(CorrelationError, match="corrections of a ticket are not those of what it is for"):
            bob.expand(4, draw.bob, wrong)
    with pytest.raises(CorrelationError, match="corrections of a ticket"):
        bob.expand(1, draw.bob, corrections)
    assert [(t.dtype, tuple(t.shape)) for t in corrections] == [(i.dtype, i.shape) for i in bob.items(4)]
    with pytest.raises(InputError, match="shares are not those"):
        bob.run(4, [Share(torch.zeros(1, 1, 6, 6, dtype=torch.int64), FRACTION_BITS, Role.BOB)])
    with pytest.raises(InputError, match="deals from its own part"):
        DealtModel(pushed.bob)


# Bytes from elsewhere


def described(part: ModelPart, change: Callable[[list[Any]], None]) -> ModelPart:
    """The part with another description."""
    packed = msgspec.msgpack.decode(part.description)
    change(packed)
    return replace(part, description=msgspec.msgpack.encode(packed))


def programmed(part: ModelPart, change: Callable[[list[Any]], None]) -> ModelPart:
    """The part with another program for batches of 1."""

    def changed(packed: list[Any]) -> None:
        program = msgspec.msgpack.decode(packed[5][0][2])
        change(program)
        packed[5][0][2] = msgspec.msgpack.encode(program)

    return described(part, changed)


def assign(content: Any, *path: Any) -> None:
    """content[a][b] = c for the path a, b, c."""
    *keys, last, value = path
    for key in keys:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ((0, 2), "does not parse"),
        ((1, "../x"), "description of a model is wrong"),
        ((2, "ed25519:x"), "description of a model is wrong"),
        ((3, b"short"), "commits to nothing"),
        ((3, bytes(32)), "other masked weights"),
        ((4, [[[1, 6, 5], False]]), "takes other inputs"),
        ((4, []), "takes other inputs"),
        ((5, []), "does not parse"),
        ((5, 0, 0, 0), "does not parse"),
        ((5, 0, 0, 2), "takes other inputs"),
        ((5, 0, 0, 4), "in order"),
        ((5, 0, 1, 1), "that do not belong to it"),
        ((5, 0, 2, b"x"), "does not parse"),
    ],
)
def test_a_description_that_is_wrong_is_refused(pushed: Push, path: Any, why: str) -> None:
    with pytest.raises(CodecError, match=why):
        sent(described(pushed.bob, lambda packed: assign(packed, *path)))


def nodes_of(pushed: Push, operator: str) -> int:
    nodes = pushed.bob.programs[1].graph.nodes
    return next(number for number, node in enumerate(nodes) if operator in node.operator)


@pytest.mark.parametrize(
    ("operator", "path", "why"),
    [
        ("convolution", (1, "aten.system.default"), "operator that this side does not know"),
        ("convolution", (1, "os.system"), "operator that this side does not know"),
        ("convolution", (1, "__import__"), "operator that this side does not know"),
        ("convolution", (2, 3, ["x"]), "cannot run"),
        ("convolution", (2, 3, [-1, -1]), "cannot run"),
        ("convolution", (2, []), "cannot run"),
        ("convolution", (2, 0, {"code": "import os"}), "neither a number"),
        ("convolution", (3, {"out": 1}), "cannot run"),
        ("addmm", (1, "aten.relu.default"), "cannot run"),
        ("relu", (0, "x"), "used twice|none before it"),
    ],
)
def test_a_program_that_is_no_program_is_refused(pushed: Push, operator: str, path: Any, why: str) -> None:
    number = nodes_of(pushed, operator)
    with pytest.raises(CodecError, match=why):
        sent(programmed(pushed.bob, lambda program: assign(program, 2, number, *path)))


def test_weights_that_do_not_fit_are_refused(pushed: Push) -> None:
    body, tensors = pack(pushed.alice)
    state = len(pushed.alice.variants[0].state)
    square = next(number for number, tensor in enumerate(tensors) if tensor.dim() > 1)
    wrong: list[list[Tensor]] = [
        [],
        list(tensors[1:]),
        list(tensors[:-1]),
        [*tensors, tensors[-1]],
        [tensors[0], tensors[1].to(torch.int32), *tensors[2:]],
        [*tensors[:square], tensors[square].flatten(), *tensors[square + 1 :]],
        [*tensors[: state + 1], tensors[state + 1] + 1, *tensors[state + 2 :]],
    ]
    for given in wrong:
        with pytest.raises(CodecError):
            unpack(body, given, "alice")
    for data in (b"", body[:-1], body + b"\0"):
        with pytest.raises(CodecError):
            unpack(data, tensors, "alice")
    salted = replace(pushed.alice, secret=bytes(32))
    with pytest.raises(CodecError, match="other masked weights"):
        sent(salted)
    with pytest.raises(CodecError, match="a seed and no weights"):
        sent(replace(pushed.provider, secret=bytes(15)))


# On disk


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    return Vault(tmp_path / "alice", KEY, "alice")


def test_the_vault_gives_back_what_was_saved(pushed: Push, vault: Vault, tmp_path: Path) -> None:
    entry = vault.save(pushed.alice)
    assert vault.save(pushed.alice) == entry
    again = Vault(tmp_path / "alice", KEY, "alice")
    assert again.list() == [entry]
    assert (entry.name, entry.owner, entry.digest, entry.role) == ("small", OWNER, pushed.digest, "alice")
    assert (entry.number, entry.batch_sizes) == (1, (1, 4))
    part = again.load(entry.digest)
    assert (part.description, part.secret) == (pushed.alice.description, pushed.alice.secret)
    for mine, theirs in zip(part.variants, pushed.alice.variants, strict=True):
        for one, other in ((mine.state, theirs.state), (mine.differences, theirs.differences)):
            assert list(one) == list(other)
            assert all(torch.equal(one[name], other[name]) for name in one)
    for role in ("bob", "provider"):
        other = Vault(tmp_path / role, KEY, role)
        other.save(getattr(pushed, role))
        assert other.load(pushed.digest).role == role
        with pytest.raises(InputError, match="meant for alice"):
            other.save(pushed.alice)


def test_versions_names_and_owners(pushed: Push, vault: Vault) -> None:
    vault.save(pushed.alice)
    newer = prepare(nn.Linear(3, 2), [torch.zeros(1, 3)], name="small", owner=OWNER, batch_sizes=[2])
    vault.save(newer.alice)
    assert vault.current("small").digest == newer.digest
    stolen = prepare(nn.Linear(3, 2), [torch.zeros(1, 3)], name="small", owner=STRANGER, batch_sizes=[1])
    with pytest.raises(InputError, match="belongs to another owner"):
        vault.save(stolen.alice)
    require_owner(vault.current("small"), OWNER)
    with pytest.raises(InputError, match="belongs to another owner"):
        require_owner(vault.current("small"), STRANGER)
    vault.delete(newer.digest)
    vault.delete(newer.digest)
    assert vault.current("small").digest == pushed.digest
    with pytest.raises(InputError, match="no model 'large'"):
        vault.current("large")
    with pytest.raises(InputError, match="has it been pushed"):
        vault.load(newer.digest)
    with pytest.raises(InputError, match="64 hexadecimal"):
        vault.load("../../etc/passwd")


def test_nothing_of_a_part_lies_in_the_clear(pushed: Push, vault: Vault, tmp_path: Path) -> None:
    vault.save(pushed.alice)
    (path,) = (tmp_path / "alice").iterdir()
    content = path.read_bytes()
    assert path.stat().st_mode & 0o077 == 0
    secrets = [pushed.alice.secret, pushed.alice.description[100:132]]
    for variant in pushed.alice.variants:
        kept = (one.words for one in pushed.alice.kept.values())
        for value in (*variant.state.values(), *variant.differences.values(), *kept):
            secrets += [word.numpy().tobytes() for word in value.flatten()[:20]]
    for value in small().state_dict().values():
        secrets += [value.numpy().tobytes(), encode(value).numpy().tobytes()]
    assert len(secrets) > 60
    assert not any(secret in content for secret in secrets if len(secret) >= 8)


@pytest.mark.parametrize("at", ["header", "tag", "salt", "piece", "last", "cut", "longer", "empty"])
def test_a_damaged_file_is_an_error_and_no_model(pushed: Push, vault: Vault, tmp_path: Path, at: str) -> None:
    vault.save(pushed.alice)
    (path,) = (tmp_path / "alice").iterdir()
    content = bytearray(path.read_bytes())
    header = content.index(pushed.digest.encode()) + 64
    match at:
        case "cut":
            del content[-1:]
        case "longer":
            content += b"\0"
        case "empty":
            content.clear()
        case _:
            content[{"header": 50, "tag": header + 20, "salt": 20, "piece": header + 200, "last": -1}[at]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be used: .* push it again"):
        vault.load(pushed.digest)


def test_another_key_and_a_moved_file_are_told(pushed: Push, vault: Vault, tmp_path: Path) -> None:
    vault.save(pushed.alice)
    (path,) = (tmp_path / "alice").iterdir()
    with pytest.raises(DataError, match="sealed under another key"):
        Vault(tmp_path / "alice", bytes(32), "alice").load(pushed.digest)
    with pytest.raises(DataError, match="sealed under another key"):
        Vault(tmp_path / "alice", bytes(32), "alice").list()
    moved = path.with_name(f"{'0' * 64}.model")
    path.rename(moved)
    with pytest.raises(DataError, match="another model than it says"):
        vault.load("0" * 64)
    with pytest.raises(CodecError, match="meant for alice"):
        Vault(tmp_path / "alice", KEY, "bob").load("0" * 64)
