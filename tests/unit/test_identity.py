import base64
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from tacit.errors import DataError, InputError
from tacit.identity import Identity, key_text, parse_key, verify

SEED = bytes(range(32))
PUBLIC = "ed25519:A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
PRIME = 2**255 - 19
ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
LOW_ORDER = (0, 1, PRIME - 1, ORDER_8, PRIME - ORDER_8)
CURVE_D = -121665 * pow(121666, -1, PRIME) % PRIME


def of(seed: int) -> Identity:
    return Identity(seed.to_bytes(32, "big"))


class TestSigning:
    def test_a_signature_holds_for_its_signer_purpose_and_content_only(self) -> None:
        signature = of(1).sign("trial", b"content")
        assert verify(of(1).public, "trial", b"content", signature)
        assert not verify(of(2).public, "trial", b"content", signature)
        assert not verify(of(1).public, "trial 2", b"content", signature)
        assert not verify(of(1).public, "trial", b"content.", signature)
        assert not verify(of(1).public, "trial", b"content", signature[:-1])
        assert not verify(b"", "trial", b"content", signature)

    def test_what_is_signed_begins_with_the_purpose(self) -> None:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
        assert Identity(SEED).sign("trial", b"content") == key.sign(b"tacit/v1/trial\0content")

    def test_a_seed_of_another_length(self) -> None:
        with pytest.raises(InputError, match="32 bytes, not 31"):
            Identity(bytes(31))

    def test_fresh_ones_differ(self) -> None:
        assert Identity.fresh().public != Identity.fresh().public


class TestStorageKey:
    def test_depends_on_identity_and_purpose(self) -> None:
        keys = [of(i).storage_key(purpose) for i in (1, 2) for purpose in ("vault", "pool")]
        assert len(set(keys)) == 4
        assert of(1).storage_key("vault") == keys[0]
        assert of(1).storage_key("vault", 16) == keys[0][:16]

    def test_is_hkdf_of_the_seed(self) -> None:
        expected = HKDF(SHA256(), 32, None, b"tacit/v1/storage/vault").derive(SEED)
        assert Identity(SEED).storage_key("vault") == expected


class TestText:
    def test_round_trip(self) -> None:
        assert key_text(Identity(SEED).public) == PUBLIC
        assert parse_key(PUBLIC) == Identity(SEED).public

    @pytest.mark.parametrize(
        "text",
        [
            "",
            PUBLIC.removeprefix("ed25519:"),
            PUBLIC.replace("ed25519", "ssh-ed25519"),
            PUBLIC[:-1],
            PUBLIC + " ",
            PUBLIC + "\n",
            PUBLIC.replace("g=", "h="),  # the same bytes in an encoding that is not canonical
            PUBLIC.replace("/", "_"),
            "ed25519:" + base64.b64encode(bytes(31)).decode(),
            "ed25519:" + "é" * 44,
        ],
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="is not a public key: expected ed25519:"):
            parse_key(text)

    @pytest.mark.parametrize("sign", [0, 1 << 255])
    @pytest.mark.parametrize("y", [*LOW_ORDER, PRIME, PRIME + 1, 2, 7, PRIME + 3])
    def test_points_that_are_nobodys(self, y: int, sign: int) -> None:
        with pytest.raises(InputError, match="not the public key of anybody"):
            parse_key(key_text((y | sign).to_bytes(32, "little")))

    def test_why_points_of_low_order_are_refused(self) -> None:
        everybodys, signature = bytes(32), (1).to_bytes(32, "little") + bytes(32)
        forged = [number for number in range(64) if verify(everybodys, "trial", bytes([number]), signature)]
        assert forged, "signatures were found without a private key"

    @given(st.binary(min_size=32, max_size=32))
    def test_every_real_key_is_accepted(self, seed: bytes) -> None:
        public = Identity(seed).public
        assert parse_key(key_text(public)) == public

    @given(st.text())
    def test_any_text_parses_or_is_refused(self, text: str) -> None:
        with pytest.raises(InputError):
            parse_key(text)

    @given(st.binary(min_size=32, max_size=32))
    def test_any_32_bytes_parse_or_are_refused(self, data: bytes) -> None:
        y = int.from_bytes(data, "little") % 2**255
        x_squared = (y * y - 1) * pow(CURVE_D * y * y + 1, -1, PRIME) % PRIME
        exists = y < PRIME and pow(x_squared, (PRIME - 1) // 2, PRIME) == 1
        if exists and y not in LOW_ORDER:
            assert parse_key(key_text(data)) == data
        else:
            with pytest.raises(InputError):
                parse_key(key_text(data))


def test_nothing_secret_is_printed() -> None:
    identity = Identity(SEED)
    assert repr(identity) == f"{identity}" == f"Identity({PUBLIC})"


class TestFile:
    def test_round_trip(self, tmp_path: Path) -> None:
        Identity(SEED).save(tmp_path / "alice.key")
        assert Identity.load(tmp_path / "alice.key").public == Identity(SEED).public
        assert Identity.load(tmp_path / "alice.key").storage_key("vault") == Identity(SEED).storage_key("vault")
        assert [path.name for path in tmp_path.iterdir()] == ["alice.key"]

    def test_only_the_owner_can_read_it_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            Identity(SEED).save(tmp_path / "alice.key")
        finally:
            os.umask(before)
        assert (tmp_path / "alice.key").stat().st_mode & 0o777 == 0o600

    def test_never_over_another(self, tmp_path: Path) -> None:
        (tmp_path / "alice.key").write_text("precious")
        with pytest.raises(InputError, match=r"alice\.key is there already: keys are not overwritten"):
            Identity(SEED).save(tmp_path / "alice.key")
        assert (tmp_path / "alice.key").read_text() == "precious"
        assert len(list(tmp_path.iterdir())) == 1

    def test_nowhere_to_write(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"no key can be written to .*missing.*No such file"):
            Identity(SEED).save(tmp_path / "missing" / "alice.key")

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601, 0o666])
    def test_refused_if_others_can_read_it(self, tmp_path: Path, mode: int) -> None:
        path = tmp_path / "alice.key"
        Identity(SEED).save(path)
        path.chmod(mode)
        with pytest.raises(InputError, match=rf"by others \(mode {mode:04o}\): run `chmod 600"):
            Identity.load(path)

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read: No such file"):
            Identity.load(tmp_path / "alice.key")
        with pytest.raises(InputError, match="cannot be read: Is a directory"):
            Identity.load(tmp_path)

    def damaged(self) -> dict[str, bytes]:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(SEED)
        pem, pkcs8 = Encoding.PEM, PrivateFormat.PKCS8
        whole = key.private_bytes(pem, pkcs8, NoEncryption())
        return {
            "empty": b"",
            "cut": whole[:60],
            "changed": whole.replace(b"MC4", b"MC5"),
            "public": key.public_key().public_bytes(pem, PublicFormat.SubjectPublicKeyInfo),
            "encrypted": key.private_bytes(pem, pkcs8, BestAvailableEncryption(b"password")),
            "other kind": x25519.X25519PrivateKey.from_private_bytes(SEED).private_bytes(pem, pkcs8, NoEncryption()),
            "zeros": bytes(1 << 16),
        }

    def test_damaged_or_of_another_kind(self, tmp_path: Path) -> None:
        for name, content in self.damaged().items():
            path = tmp_path / name
            path.touch(0o600)
            path.write_bytes(content)
            with pytest.raises(DataError, match="does not hold an unencrypted Ed25519 private key") as caught:
                Identity.load(path)
            assert "MC4" not in str(caught.value)

    def test_several_writers_at_once(self, tmp_path: Path) -> None:
        path, together = tmp_path / "alice.key", Barrier(4)

        def write(number: int) -> int | None:
            together.wait()
            try:
                of(number).save(path)
            except InputError:
                return None
            return number

        with ThreadPoolExecutor(4) as pool:
            written = [number for number in pool.map(write, range(4)) if number is not None]
        assert len(written) == 1
        assert Identity.load(path).public == of(written[0]).public
