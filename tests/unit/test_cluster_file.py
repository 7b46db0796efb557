import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tacit.cli.main import app
from tacit.errors import InputError
from tacit.identity import Identity, key_text
from tacit.party import cluster_file
from tacit.party.address import Address, parse_address
from tacit.party.cluster_file import Client, ClusterFile, Member, Owner, Parties
from tacit.program.network import NETWORKS

DOCUMENTED = (Path(__file__).parents[2] / "docs" / "deploy" / "cluster.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"```toml\n(.*?)```", DOCUMENTED, re.DOTALL)
SECTIONS = {
    "parties.NAME": Member,
    "owners.NAME": Owner,
    "clients.NAME": Client,
    "serving": cluster_file.Serving,
    "pools": cluster_file.Pools,
    "training": cluster_file.TrainingJobs,
    "network": cluster_file.NetworkFigures,
}


def key(number: int) -> str:
    return key_text(Identity(bytes([number]) * 32).public)


class TestDocumentation:
    def parts(self) -> dict[str, str]:
        return dict(re.findall(r"^## `\[([\w.]+)\]`\n(.*?)(?=^## |\Z)", DOCUMENTED, re.DOTALL | re.MULTILINE))

    def test_every_section_is_documented_key_by_key(self) -> None:
        assert self.parts().keys() == SECTIONS.keys()
        for name, kind in SECTIONS.items():
            rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", self.parts()[name], re.MULTILINE)
            assert sorted(row[0] for row in rows) == sorted(kind.__struct_fields__)

    def test_the_documented_defaults_are_the_defaults(self) -> None:
        for name, kind in SECTIONS.items():
            for field in msgspec.structs.fields(kind):
                (default,) = re.findall(rf"^\| `{field.name}` \| (.*?) \|", self.parts()[name], re.MULTILINE)
                if field.required:
                    assert default == "needed"
                elif field.default is None:
                    assert default == "none"
                else:
                    assert msgspec.convert(msgspec.json.decode(default.strip("`")), field.type) == field.default

    def test_the_example_is_one(self) -> None:
        cluster = cluster_file.parse(EXAMPLE)
        assert cluster.party("alice").reached_at == Address("alice.example", 7401)
        assert cluster.party("alice").http_at == Address("127.0.0.1", 9401)
        assert cluster.party("bob").http_at is None
        assert cluster.pins() == {
            name: Identity(bytes([number]) * 32).public
            for number, name in enumerate(("alice", "bob", "provider", "hospital", "clinic"))
        }
        assert cluster.network.for_planning() == NETWORKS["lan"]

    def test_who_may_ask_what(self) -> None:
        cluster = cluster_file.parse(EXAMPLE + f'[clients.lab]\nkey = "{key(9)}"\nmodels = ["*"]\n')
        allowed = [
            (client, model)
            for client in cluster.pins()
            for model in ("mnist", "other")
            if cluster.may_ask(client, model)
        ]
        assert allowed == [("clinic", "mnist"), ("lab", "mnist"), ("lab", "other")]


TOP = "[parties.alice]"
WRONG = {
    "not TOML": (TOP, "[parties.alice", "is not TOML"),
    "a section too many": (TOP, "[gateway]\n" + TOP, "in the top level: .*unknown field `gateway`"),
    "a party too many": (TOP, "[parties.carol]\n" + TOP, "in parties: .*unknown field `carol`"),
    "a party missing": ("parties.bob", "clients.rob", "in clients.rob: .*unknown field `address`"),
    "a key too many": ('models = ["mnist"]', "model = 1", "in clients.clinic: .*unknown field `model`"),
    "no key": (f'key = "{key(1)}"', "", "in parties.bob: .*missing required field `key`"),
    "half a key": (key(4), key(4)[:-3], "in clients.clinic: 'ed25519:.*' is not a public key"),
    "a key of low order": (key(4), key_text(bytes(32)), "in clients.clinic: .* not the public key of anybody"),
    "one key twice": (key(4), key(3), "clients.clinic has the key of hospital"),
    "a party's key": (key(4), key(0), "clients.clinic has the key of alice"),
    "two parties with one key": (key(1), key(0), "parties.bob has the key of alice"),
    "one name, two keys": ("[clients.clinic]", "[clients.hospital]", "owners.hospital and clients.hospital are the"),
    "a party as a client": ("[clients.clinic]", "[clients.bob]", "in clients: bob is a party's name"),
    "a name with a slash": ("[clients.clinic]", '[clients."../x"]', r"in clients: '\.\./x' is no name"),
    "no name": ("[clients.clinic]", '[clients.""]', "in clients: '' is no name"),
    "no table": ("[owners.hospital]\n", "[owners]\n", "in owners.key: Expected `object`"),
    "no tables": ("[owners.hospital]", "[[owners]]", "in owners: give a table for each"),
    "no port": ("alice.example:7401", "alice.example", "in parties.alice: 'alice.example' is not an address"),
    "one address twice": ("bob.example", "alice.example", "have the same address: alice.example:7401, alice"),
    "a bad http": ("127.0.0.1:9401", "http://127.0.0.1:9401", "in parties.alice: 'http://.*' is not an address"),
    "a model's name": ('["mnist"]', '["a b"]', "in clients.clinic: 'a b' is no name"),
    "models of another type": ('["mnist"]', '"mnist"', "in clients.clinic.models: Expected `array`, got `str`"),
    "no requests": ('models = ["mnist"]', "requests_per_minute = 0", "requests_per_minute is 0: it must be at least 1"),
    "an empty batch": ('models = ["mnist"]', "largest_batch = 0", "largest_batch is 0: it must be at least 1"),
    "a logical queue": (TOP, "[serving]\nqueue = true\n" + TOP, "in serving.queue: Expected `int`"),
    "no sizes": (TOP, "[serving]\nbatch_sizes = []\n" + TOP, "the smallest of batch_sizes is 0"),
    "sizes": (TOP, "[serving]\nbatch_sizes = [8, 1]\n" + TOP, "they must ascend"),
    "no such choice": (TOP, '[serving]\nwhen_empty = "no"\n' + TOP, "in serving.when_empty: "),
    "time backwards": (TOP, "[serving]\nlatency_ms = -1\n" + TOP, "latency_ms is -1"),
    "for ever": (TOP, "[network]\nrtt_ms = inf\n" + TOP, "rtt_ms is inf: it must be a number"),
    "nothing": (TOP, "[pools]\ndisk_gb = nan\n" + TOP, "disk_gb is nan: it must be a number"),
    "no bandwidth": (TOP, "[network]\nmbps = 0\n" + TOP, "in network: .*bandwidth above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str) -> None:
    old, new, complaint = WRONG[name]
    changed = EXAMPLE.replace(old, new, 1)
    assert changed != EXAMPLE
    with pytest.raises(InputError, match=rf"(?s)cluster\.toml.*{complaint}"):
        cluster_file.parse(changed, "cluster.toml")


def test_a_party_is_missing() -> None:
    with pytest.raises(InputError, match="in parties: Object missing required field `provider`"):
        cluster_file.parse(re.sub(r"\[parties\.provider\].*?(?=\[owners)", "", EXAMPLE, flags=re.DOTALL))
    with pytest.raises(InputError, match="none is not one of alice, bob, provider"):
        cluster_file.parse(EXAMPLE).party("none")


def test_an_owner_may_be_a_client_too() -> None:
    both = EXAMPLE.replace("[clients.clinic]", "[clients.hospital]").replace(key(4), key(3))
    assert cluster_file.parse(both).may_ask("hospital", "mnist")


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True).filter(
    lambda n: n not in cluster_file.PARTIES
)
COUNTS = st.integers(1, 1 << 40)
FINITE = st.floats(0, 1e9)


@st.composite
def clusters(draw: st.DrawFn) -> ClusterFile:
    numbers = iter(range(256))
    hosts = st.sampled_from(["alice.example", "10.0.0.1", "fd00::1", "::1", "localhost"])
    ports = draw(st.lists(st.integers(1, 65535), min_size=3, max_size=3, unique=True))
    addresses = [Address(draw(hosts), port) for port in ports]
    members = [
        cluster_file.member(Identity(bytes([next(numbers)]) * 32).public, one, draw(st.sampled_from([None, one])))
        for one in addresses
    ]
    names = draw(st.lists(NAMES, unique=True, max_size=4))
    people = [
        Client(
            key=key(next(numbers)),
            models=tuple(draw(st.lists(NAMES | st.just("*"), max_size=2))),
            requests_per_minute=draw(COUNTS),
            largest_batch=draw(COUNTS),
        )
        for _ in names
    ]
    sizes = tuple(sorted(draw(st.sets(COUNTS, min_size=1, max_size=3))))
    return ClusterFile(
        parties=Parties(alice=members[0], bob=members[1], provider=members[2]),
        owners={name: Owner(key=one.key) for name, one in zip(names[:2], people, strict=False)},
        clients=dict(zip(names[1:], people[1:], strict=True)),
        serving=cluster_file.Serving(
            batch_sizes=sizes, latency_ms=draw(FINITE), queue=draw(COUNTS), workers=draw(COUNTS), when_empty="fail"
        ),
        pools=cluster_file.Pools(disk_gb=draw(FINITE), ahead=draw(COUNTS)),
        network=cluster_file.NetworkFigures(rtt_ms=draw(FINITE), mbps=draw(st.floats(0.001, 1e9))),
    )


@given(clusters())
def test_what_is_written_reads_the_same(cluster: ClusterFile) -> None:
    assert cluster_file.parse(cluster.text()) == cluster


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        cluster_file.parse(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda kids: (
            st.lists(kids) | st.dictionaries(st.sampled_from(["parties", "alice", "key", "clients", "models"]), kids)
        ),
    )
)
def test_any_value_in_any_place_is_refused(value: Any) -> None:
    with pytest.raises(InputError):
        msgspec.structs.replace(
            cluster_file.parse(EXAMPLE), clients=cluster_file._entries({"clinic": value}, Client, "clients", "x")
        )


def test_files(tmp_path: Path) -> None:
    path, cluster = tmp_path / "cluster.toml", cluster_file.parse(EXAMPLE)
    cluster_file.write(cluster, path)
    assert cluster_file.read(path) == cluster
    with pytest.raises(InputError, match=r"cluster\.toml is there already"):
        cluster_file.write(cluster, path)
    with pytest.raises(InputError, match=r"no cluster file can be written to .*No such file"):
        cluster_file.write(cluster, tmp_path / "missing" / "cluster.toml")
    with pytest.raises(InputError, match="cannot be read"):
        cluster_file.read(tmp_path / "other.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot be read"):
        cluster_file.read(path)
    assert [one.name for one in tmp_path.iterdir()] == ["cluster.toml"]


class TestAddress:
    @pytest.mark.parametrize("text", ["alice.example:7401", "10.0.0.2:1", "[fd00::2]:65535", "[::]:80", "a_b-c:9"])
    def test_round_trip(self, text: str) -> None:
        assert str(parse_address(text)) == text

    @pytest.mark.parametrize(
        "text",
        ["", ":", "alice", "alice:", ":7401", "alice:0", "alice:65536", "alice:07401", "alice:7 401", "alice:٧",
         "a b:1",          "fd00::2:7401", "[fd00::2]", "[alice]:7401", "[fd00::2:7401", "[::1%eth0]:1", "-alice:1", "http://alice:1",
         "alice:7401\n", "alice:-1", "é:1", "a" * 254 + ":1"],
    )  # fmt: skip
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="is not an address: give host:port"):
            parse_address(text)


class TestCommands:
    def run(self, *arguments: str) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, ["keys", *arguments])
        return result.exit_code, result.stdout, str(result.exception)

    def test_new_and_show(self, tmp_path: Path) -> None:
        code, printed, _ = self.run("new", "clinic", "--folder", str(tmp_path))
        identity = Identity.load(tmp_path / "clinic.key")
        assert (code, printed) == (0, f"clinic {key_text(identity.public)}\n")
        assert self.run("show", str(tmp_path / "clinic.key"))[:2] == (code, printed)

    def test_mistakes(self, tmp_path: Path) -> None:
        folder = ("--folder", str(tmp_path))
        assert self.run("new", "clinic", *folder)[0] == 0
        assert "is there already" in self.run("new", "clinic", *folder)[2]
        for name in ("", "a/b", "..", "."):
            assert "is no name" in self.run("new", name, *folder)[2]
        assert "cannot be read" in self.run("show", str(tmp_path / "other.key"))[2]
        (tmp_path / "clinic.key").chmod(0o644)
        assert "by others" in self.run("show", str(tmp_path / "clinic.key"))[2]
