"""Signed bundles: what is changed anywhere is refused, and unsigned ones stay usable and say so."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from detr.errors import GateError, UserError
from detr.files import sha256
from engines import open_engine
from engines.bundle import open_bundle
from engines.evidence import Evidence
from engines.signature import SIGNATURE, TRUSTED_KEY, check, sign
from export.cli import main

MakeBundle = Callable[..., Path]


def write_keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A private and a public key in PEM."""
    private = ed25519.Ed25519PrivateKey.generate()
    return write_pem(private, folder / name)


def write_pem(
    private: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey,
    path: Path,
    passphrase: bytes = b"",
) -> tuple[Path, Path]:
    locked = serialization.BestAvailableEncryption(passphrase) if passphrase else None
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        locked or serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.with_suffix(".pem").write_bytes(pem)
    path.with_suffix(".pub").write_bytes(public)
    return path.with_suffix(".pem"), path.with_suffix(".pub")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def bundle(toy_bundle: MakeBundle) -> Path:
    """With an engine in it, as one is shipped."""
    folder = toy_bundle()
    engine = folder / "engines" / "tensorrt-sm86-fp32"
    engine.mkdir(parents=True)
    (engine / "model.engine").write_bytes(bytes(range(256)) * 16)
    Evidence(
        artifact="model.engine",
        sha256=sha256(engine / "model.engine"),
        bundle_sha256=open_bundle(folder).info.fingerprint,
        backend="tensorrt",
        status="accepted",
    ).write(engine)
    return folder


def test_a_hundred_altered_bytes_are_a_hundred_refusals(
    bundle: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    """Graph, sidecar, golden images, engine, evidence and signature, anywhere in them."""
    sign(bundle, keys[0])
    assert check(bundle, keys[1]).signed.files.keys() >= {
        "bundle.json",
        "model.onnx",
        "golden.npz",
        "engines/tensorrt-sm86-fp32/model.engine",
        "engines/tensorrt-sm86-fp32/evidence.json",
    }
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    assert bundle / SIGNATURE in files
    generator = random.Random(0)
    for turn in range(100):
        path = files[turn % len(files)]
        content = bytearray(path.read_bytes())
        whole = bytes(content)
        place = generator.randrange(len(content))
        content[place] ^= generator.randrange(1, 256)
        path.write_bytes(content)
        with pytest.raises(GateError) as error:
            check(bundle, keys[1])
        assert error.value.code in ("signature-invalid", "signature-changed"), (path, place)
        path.write_bytes(whole)
    check(bundle, keys[1])


def test_a_file_added_renamed_or_taken_away_is_refused(
    bundle: Path, keys: tuple[Path, Path]
) -> None:
    sign(bundle, keys[0])
    engine = bundle / "engines" / "tensorrt-sm86-fp32"
    other = engine.with_name("tensorrt-sm89-fp32")
    shutil.copytree(engine, other)
    with pytest.raises(GateError, match="added since it was signed"):
        check(bundle, keys[1])
    shutil.rmtree(other)
    engine.rename(other)
    with pytest.raises(GateError, match="since it was signed"):
        check(bundle, keys[1])
    other.rename(engine)
    (engine / "model.engine").unlink()
    with pytest.raises(GateError, match="gone since it was signed"):
        check(bundle, keys[1])


def test_another_key_is_refused(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    """Also where the forger wrote the owner's key into the file."""
    sign(bundle, write_keys(tmp_path, "forger")[0])
    with pytest.raises(GateError, match="signed with another key") as error:
        check(bundle, keys[1])
    assert error.value.code == "signature-invalid"
    forged = json.loads((bundle / SIGNATURE).read_text())
    sign(bundle, keys[0])
    owners = json.loads((bundle / SIGNATURE).read_text())["signed"]["key"]
    forged["signed"]["key"] = owners
    (bundle / SIGNATURE).write_text(json.dumps(forged, indent=1) + "\n")
    with pytest.raises(GateError, match="signature"):
        check(bundle, keys[1])


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"signed": {}, "signature": 1}'])
def test_what_is_no_signature_is_refused(
    bundle: Path, keys: tuple[Path, Path], content: bytes
) -> None:
    (bundle / SIGNATURE).write_bytes(content)
    with pytest.raises(GateError) as error:
        check(bundle, keys[1])
    assert error.value.code == "signature-invalid" and "\n" not in str(error.value)


def test_where_the_environment_asks_for_it_nothing_else_is_opened(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_engine(bundle, "onnxruntime")
    monkeypatch.setenv(TRUSTED_KEY, str(keys[1]))
    with pytest.raises(GateError, match="not signed") as error:
        open_engine(bundle, "onnxruntime")
    assert error.value.code == "signature-missing"
    sign(bundle, keys[0])
    open_engine(bundle, "onnxruntime")
    (bundle / "engines" / "tensorrt-sm86-fp32" / "model.engine").write_bytes(b"another")
    with pytest.raises(GateError, match=r"model\.engine: changed since it was signed"):
        open_engine(bundle, "onnxruntime")


def test_keys_that_are_none(bundle: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no key")
    elliptic = write_pem(ec.generate_private_key(ec.SECP256R1()), tmp_path / "elliptic")
    locked = write_pem(ed25519.Ed25519PrivateKey.generate(), tmp_path / "locked", b"secret")
    for path in (tmp_path / "gone.pem", tmp_path / "no.pem", elliptic[0], locked[0], keys[1]):
        with pytest.raises(UserError, match="openssl genpkey") as error:
            sign(bundle, path)
        assert error.value.code == "key-unreadable" and str(path) in str(error.value)
    sign(bundle, keys[0])
    for path in (tmp_path / "gone.pub", tmp_path / "no.pem", elliptic[1], keys[0]):
        with pytest.raises(UserError, match="openssl pkey") as error:
            check(bundle, path)
        assert error.value.code == "key-unreadable"


def test_without_cryptography_the_extra_is_named(
    bundle: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UserError, match=r"detr-distillery\[sign\]") as error:
        sign(bundle, keys[0])
    assert error.value.code == "signing-missing"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def test_the_two_commands(bundle: Path, keys: tuple[Path, Path]) -> None:
    told = run("check", bundle, "--key", keys[1])
    assert told.exit_code == 3 and "error[signature-missing]" in told.stderr
    told = run("sign", bundle, "--key", keys[0])
    assert told.exit_code == 0 and "5 files signed" in told.stdout
    told = run("check", bundle, "--key", keys[1])
    assert told.exit_code == 0 and "as signed, 5 files" in told.stdout
    told = run("check", bundle, "--key", keys[1], "--json")
    assert len(json.loads(told.stdout)["signed"]["files"]) == 5
    (bundle / "bundle.json").write_text("{}")
    told = run("check", bundle, "--key", keys[1])
    assert told.exit_code == 3 and "bundle.json: changed since" in told.stderr
    told = run("check", bundle / "gone", "--key", keys[1])
    assert told.exit_code == 2 and "error[bundle-missing]" in told.stderr


def test_signing_again_takes_new_engines_in(bundle: Path, keys: tuple[Path, Path]) -> None:
    sign(bundle, keys[0])
    (bundle / "engines" / "new.txt").write_text("new")
    with pytest.raises(GateError):
        check(bundle, keys[1])
    sign(bundle, keys[0])
    assert "engines/new.txt" in check(bundle, keys[1]).signed.files
