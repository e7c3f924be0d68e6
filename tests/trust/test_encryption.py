# SPDX-License-Identifier: Apache-2.0
"""Which key is taken of those that are given, and what becomes of a key that cannot be one."""

from __future__ import annotations

import base64
import subprocess
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import SingularityError, UserError
from pysingularity.image.assemble import SifAssembly
from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image
from pysingularity.sif.layout import host_arch
from pysingularity.squashfs.node import Node
from pysingularity.trust import primitives
from pysingularity.trust.encryption import Key, Seal, key_of, unwrap, wrap


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tool):
    """The texts of an RSA key and of its public half, as OpenSSL writes them of old."""
    folder = tmp_path_factory.mktemp("keys")
    private, public = folder / "key.pem", folder / "public.pem"
    for words in (
        ("genrsa", "-traditional", "-out", private, "2048"),
        ("rsa", "-in", private, "-RSAPublicKey_out", "-out", public),
        ("rsa", "-in", private, "-aes128", "-passout", "pass:xxxx", "-out", folder / "guarded.pem"),
        ("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", folder / "curve.pem"),
    ):
        subprocess.run([tool("openssl"), *words], check=True, capture_output=True)
    return folder


def test_order_is_that_of_apptainer(pair):
    public = (pair / "public.pem").read_bytes()
    everything = {
        "APPTAINER_ENCRYPTION_PASSPHRASE": "peer",
        "SINGULARITY_ENCRYPTION_PASSPHRASE": "ours",
        "APPTAINER_ENCRYPTION_PEM_DATA": "data",
        "SINGULARITY_ENCRYPTION_PEM_PATH": str(pair / "public.pem"),
    }
    key = key_of(everything, pem_path=str(pair / "key.pem"), ask=lambda: b"asked")
    assert key is not None and key.pem == (pair / "key.pem").read_bytes()
    key = key_of(everything, ask=lambda: b"asked")
    assert key is not None and key.passphrase == b"asked"
    key = key_of(everything)
    assert key is not None and key.pem == public
    del everything["SINGULARITY_ENCRYPTION_PEM_PATH"]
    key = key_of(everything)
    assert key is not None and key.pem == b"data"
    del everything["APPTAINER_ENCRYPTION_PEM_DATA"]
    key = key_of(everything)
    assert key is not None and key.passphrase == b"ours"
    del everything["SINGULARITY_ENCRYPTION_PASSPHRASE"]
    key = key_of(everything)
    assert key is not None and key.passphrase == b"peer"
    assert key_of({"SINGULARITY_ENCRYPTION_PASSPHRASE": ""}) is None
    with pytest.raises(UserError, match="empty"):
        key_of({}, ask=lambda: b"")


def test_no_key_is_ever_shown(pair):
    text = (pair / "key.pem").read_bytes()
    shown = repr(Key(passphrase=b"word")) + repr(Key(pem=text)) + repr(Seal(Key(passphrase=b"word")))
    assert "word" not in shown and "BEGIN" not in shown


@given(st.binary(max_size=3000))
def test_message_is_unwrapped_as_it_was_wrapped(data):
    assert unwrap(wrap(data)) == data


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(data):
    for text in (
        data,
        wrap(data)[:-30],
        b"-----BEGIN MESSAGE-----\n" + base64.b64encode(data) + b"-----END MESSAGE-----",
    ):
        try:
            unwrap(text)
        except ValueError:
            continue


def test_message_is_what_openssl_calls_an_octet_string(tmp_path, tool):
    path = tmp_path / "message.pem"
    path.write_bytes(wrap(bytes(range(256))))
    shown = subprocess.run(
        [tool("openssl"), "asn1parse", "-in", path], capture_output=True, text=True, check=True
    ).stdout
    assert "OCTET STRING" in shown and "000102030405" in shown.lower()


def test_random_passphrase_goes_through_the_message(pair):
    seal = Seal(Key(pem=(pair / "public.pem").read_bytes()))
    private = primitives.private_key((pair / "key.pem").read_bytes())
    assert primitives.oaep_decrypt(private, unwrap(seal.message)) == seal.secret
    assert len(seal.secret) == 32
    assert Seal(Key(pem=(pair / "key.pem").read_bytes())).message  # a private key holds the public one


def test_key_shorter_than_what_it_guards_is_used_piece_by_piece(tmp_path, tool):
    subprocess.run([tool("openssl"), "genrsa", "-out", tmp_path / "k.pem", "1024"], check=True, capture_output=True)
    private = primitives.private_key((tmp_path / "k.pem").read_bytes())
    data = bytes(range(150))
    stored = primitives.oaep_encrypt(private.public_key(), data)
    assert len(stored) == 3 * 128
    assert primitives.oaep_decrypt(private, stored) == data


@pytest.mark.parametrize(
    ("name", "said"),
    [("guarded.pem", "passphrase of its own"), ("curve.pem", "another kind than RSA"), ("/dev/null", "no public key")],
)
def test_what_is_no_rsa_key_is_refused_in_words(pair, name, said):
    key = key_of({}, pem_path=str(pair / name))
    assert key is not None
    with pytest.raises(UserError, match=said):
        Seal(key)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The bytes of a small encrypted image, and the key inside it."""
    folder = tmp_path_factory.mktemp("image")
    seal = Seal(Key(passphrase=b"word"))
    with SifAssembly(str(folder / "a.sif"), attributes={}, arch=host_arch(), when=1, seal=seal) as sif:
        root = Node("dir", 0o755, mtime=1)
        for number in range(40):
            content = bytes([number]) * 300 * number
            root.children[b"%d" % number] = Node("file", mtime=1, data=sif.writer.store_bytes(content))
        sif.finish(root)
    with open_image(str(folder / "a.sif")) as opened:
        offset = opened.offset
        opened.unlock(Key(passphrase=b"word"))
        assert opened.plain is not None
        return (folder / "a.sif").read_bytes(), offset, opened.plain.memory[1]


def contents(path: str, master: bytes) -> dict[bytes, bytes]:
    with open_image(path) as opened:
        opened.unlock(Key(passphrase=b"word"), recall=lambda proof: master)
        squashfs = squashfs_of(opened)
        return {name: squashfs.read(inode) for name, inode in squashfs.walk() if inode.kind == "file"}


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 1 << 20)
)
def test_image_with_any_bytes_altered_is_read_right_or_not_at_all(image, changes, cut):
    data, offset, master = image
    altered = bytearray(data)
    for place, value in changes:
        altered[offset + place % (len(data) - offset)] = value
    if cut % 3 == 0:
        del altered[offset + cut % (len(data) - offset) :]
    with tempfile.NamedTemporaryFile() as file:
        file.write(altered)
        file.flush()
        try:
            found = contents(file.name, master)
        except SingularityError:
            return
    assert found == {b"%d" % number: bytes([number]) * 300 * number for number in range(40)}
