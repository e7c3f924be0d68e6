# SPDX-License-Identifier: Apache-2.0
"""Encrypted images run for those who have the key, and for nobody else; neither key nor contents get anywhere else."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from containers import while_mounts_stay
from pysingularity.image.open import open_image
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create, plan
from pysingularity.squashfs.node import Node
from pysingularity.squashfs.writer import SquashfsWriter
from pysingularity.trust.encryption import Key
from pysingularity.trust.gocryptfs import Conf
from users import BIN

pytestmark = [pytest.mark.rootless]

SECRET = "open sesame 7"
KEY = {"SINGULARITY_ENCRYPTION_PASSPHRASE": SECRET}
OTHER = {"SINGULARITY_ENCRYPTION_PASSPHRASE": "something else"}
NOISE = random.Random(7).randbytes(700_001)
SUM = hashlib.md5(NOISE).hexdigest()


#: The encrypted image, made once.
MADE: list[bytes] = []


@pytest.fixture
def as_user(as_plain_user):
    """An ordinary user with nothing but the package."""
    return as_plain_user


@pytest.fixture
def box(box):
    """The sandbox with a file of noise and one of text."""
    (box / "opt/noise").write_bytes(NOISE)
    (box / "opt/text").write_text("the plain text of it all\n" * 4000)
    return box


@pytest.fixture
def locked(sing, box, as_user):
    """The sandbox as an image encrypted with a passphrase."""
    if not MADE:
        sing("build", "--encrypt", "first.sif", box, env=KEY, check=True)
        MADE.append((as_user.tmp / "first.sif").read_bytes())
    return as_user.write("locked.sif", MADE[0], 0o755)


@pytest.fixture
def keys(as_user, tool):
    """An RSA key pair: paths of the private and the public one."""
    private, public = as_user.tmp / "key.pem", as_user.tmp / "public.pem"
    openssl = tool("openssl")
    as_user([openssl, "genrsa", "-traditional", "-out", private, "2048"], check=True)
    as_user([openssl, "rsa", "-in", private, "-RSAPublicKey_out", "-out", public], check=True)
    return private, public


def noise_sum(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[0]


@pytest.mark.fuse
def test_passphrase_opens_what_it_closed(sing, locked, fuse):
    assert noise_sum(sing("exec", locked, "md5sum", "/opt/noise", env=KEY)) == SUM
    assert sing("run", locked, "a", env=KEY).stdout == "run: a\n"
    assert b"plain text" not in locked.read_bytes()


@pytest.mark.fuse
def test_rsa_key_opens_what_its_public_one_closed(sing, box, keys, fuse):
    private, public = keys
    sing("build", "--pem-path", public, "rsa.sif", box, check=True)
    assert sing("exec", "--pem-path", private, "rsa.sif", "echo", "in", check=True).stdout == "in\n"
    for name, value in (("PATH", private), ("DATA", private.read_text())):
        variables = {f"APPTAINER_ENCRYPTION_PEM_{name}": str(value)}
        assert sing("exec", "rsa.sif", "echo", "in", env=variables, check=True).stdout == "in\n"
    for words, env, said in (
        ((), {}, "no key was given"),
        ((), KEY, "cannot be decrypted with this passphrase"),
        (("--pem-path", public), {}, "holds no private key"),
        (("--pem-path", box / "etc/hosts"), {}, "holds no private key"),
        (("--pem-path", "nosuch.pem"), {}, "nosuch.pem: no such file"),
    ):
        result = sing("exec", *words, "rsa.sif", "true", env=env)
        assert result.returncode == 255
        assert said in result.stderr and result.stderr.count("\n") <= 2


def test_without_the_right_key_nothing_starts(sing, locked, keys):
    for words, env in (((), {}), ((), OTHER), (("--pem-path", keys[0]), KEY)):
        result = sing("exec", *words, locked, "true", env=env)
        assert result.returncode == 255
        assert result.stderr.startswith("FATAL:") and "hint:" in result.stderr
        assert result.stderr.count("\n") == 2


@pytest.mark.fuse
def test_passphrase_is_the_next_line_where_there_is_no_terminal(sing, locked, fuse):
    result = sing("exec", "--passphrase", locked, "cat", env=OTHER, input=f"{SECRET}\nfor the program\n")
    assert (result.returncode, result.stdout) == (0, "for the program\n")


def test_passphrase_is_asked_for_once_where_systemd_starts_the_command_again(sing, as_user, locked):
    """Stands in for systemd, which asks for more than a test can bring; it gives no group, so the start ends there."""
    script = '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; echo again; exec "$@"\n'
    as_user.write("bin/systemd-run", script, 0o755)
    as_user.write("run/systemd/private")
    path = f"{as_user.tmp}/bin:{as_user.environ['PATH']}"
    env = {"PATH": path, "XDG_RUNTIME_DIR": str(as_user.tmp / "run")}
    result = sing("exec", "--cpus", "1", "--passphrase", locked, "true", env=env, input=f"{SECRET}\nmore\n")
    if "again" not in result.stdout:
        pytest.skip("this machine has control groups without systemd")
    assert "systemd gave a scope" in result.stderr


def test_looking_for_the_c_library_leaves_the_image_open(locked):
    from pysingularity.runtime.accelerators import decrypted
    from pysingularity.runtime.spec import SQUASHFS, Layer

    with open_image(str(locked)) as image:
        image.unlock(Key(passphrase=SECRET.encode()))
        layer = Layer(SQUASHFS, str(locked), plain=image.plain)
        for _ in range(2):
            with decrypted(layer) as source:
                assert source.read("opt/noise") == NOISE


@pytest.mark.fuse
def test_passphrase_is_asked_for_on_the_terminal_and_not_shown(as_user, locked, fuse, tool):
    script = tool("script")
    command = f"singularity exec --passphrase {locked} echo in-there"
    with as_user.popen(
        [script, "-qec", command, "/dev/null"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        time.sleep(1.5)
        out, _ = process.communicate(f"{SECRET}\n".encode(), timeout=30)
    assert b"Enter encryption passphrase" in out and b"in-there" in out
    assert SECRET.encode() not in out


@pytest.mark.fuse
def test_key_gets_neither_to_the_program_nor_to_the_processes_around_it(sing, as_user, locked, fuse):
    script = "env; for one in /proc/[0-9]*; do cat $one/cmdline $one/environ 2>/dev/null | tr '\\0' '\\n'; done"
    result = sing("exec", "--pid", locked, "sh", "-c", script, env={**KEY, "SINGULARITY_IMAGE_KEEP": "2"})
    assert result.returncode == 0
    assert SECRET not in result.stdout and "ENCRYPTION" not in result.stdout
    # Outside, what stays behind does not show it to other processes of the user either.
    sing("exec", locked, "true", env={**KEY, "SINGULARITY_IMAGE_KEEP": "5"}, check=True)
    outside = as_user(["sh", "-c", script])
    kept = [line for line in outside.stdout.splitlines() if SECRET in line]
    assert kept == []
    for folder in (f"/run/user/{as_user.uid}/singularity", f"/dev/shm/singularity-{as_user.uid}"):
        assert as_user(["grep", "-r", SECRET, folder]).stdout == ""


def test_process_1_of_a_container_shows_no_variable_of_the_caller(sing, box):
    # Whoever has the key in a variable also starts images that are not encrypted.
    for words in (("--pid",), ("--containall",), ("--containall", "--fakeroot")):
        result = sing("exec", *words, box, "cat", "/proc/1/environ", env={**KEY, "TOKEN": "another secret"})
        assert result.returncode == 0, result.stderr
        assert SECRET not in result.stdout and "another secret" not in result.stdout


@pytest.mark.fuse
@while_mounts_stay
def test_warm_image_is_shared_by_those_who_have_the_key(sing, locked, fuse):
    def start(env):
        return sing("exec", locked, "readlink", "/proc/self/ns/user", env={**env, "SINGULARITY_IMAGE_KEEP": "15"})

    first = start(KEY)
    assert first.returncode == 0
    assert start(KEY).stdout == first.stdout
    assert start(OTHER).returncode == 255
    assert start({}).returncode == 255
    assert start(KEY).stdout == first.stdout


@pytest.mark.fuse
@while_mounts_stay
def test_second_start_is_spared_the_price_of_the_passphrase(sing, locked, fuse):
    env = {**KEY, "SINGULARITY_IMAGE_KEEP": "20"}

    def price():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        sing("exec", locked, "true", env=env, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    cold = price()
    assert min(price() for _ in range(3)) < cold / 2


@pytest.mark.fuse
def test_of_many_first_starts_one_pays_the_price(sing, as_user, locked, fuse):
    script = 'n=12; while [ $n -gt 0 ]; do singularity exec "$0" echo in & n=$((n - 1)); done; wait'

    def price(keep):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = as_user(["sh", "-c", script, locked], env={**KEY, "SINGULARITY_IMAGE_KEEP": keep})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert result.stdout == "in\n" * 12, result.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    together = price("20")
    assert together < price("0") * 2 / 3


def sockets(user):
    """Return where keepers of encrypted images of this user are asked."""
    found = as_found(
        user, "find /run/user/$(id -u)/singularity /dev/shm/singularity-$(id -u) -name '*.key' 2>/dev/null"
    )
    return set(found)


def as_found(user, script):
    return user(["sh", "-c", script]).stdout.split()


ASK = """
import socket, sys
asker = socket.socket(socket.AF_UNIX); asker.settimeout(5); asker.connect(sys.argv[1])
asker.sendall(bytes.fromhex(sys.argv[2])); print(asker.recv(64).hex())
"""


@pytest.mark.fuse
def test_keeper_tells_the_key_to_nobody_without_proof(sing, as_user, locked, fuse):
    before = sockets(as_user)
    sing("exec", locked, "true", env={**KEY, "SINGULARITY_IMAGE_KEEP": "20"}, check=True)
    (place,) = sockets(as_user) - before
    proof = Key(passphrase=SECRET.encode()).proof()
    for wrong in (bytes(32), proof[:31], proof[:-1] + bytes([proof[-1] ^ 1])):
        assert as_user([sys.executable, "-c", ASK, place, wrong.hex()]).stdout.strip() == ""
    assert len(as_user([sys.executable, "-c", ASK, place, proof.hex()]).stdout.strip()) == 64
    # Nobody else gets even there.
    assert os.stat(os.path.dirname(place)).st_mode & 0o077 == 0


@pytest.mark.fuse
def test_killed_keeper_costs_the_next_start_its_patience_only(sing, as_user, locked, fuse):
    env = {**KEY, "SINGULARITY_IMAGE_KEEP": "4"}
    before = sockets(as_user)
    sing("exec", locked, "true", env=env, check=True)
    (place,) = sockets(as_user) - before
    for pid in as_found(as_user, f"grep -lsa {locked} /proc/[0-9]*/cmdline | cut -d / -f 3"):
        with contextlib.suppress(OSError):
            if b"singularity-kp" in Path(f"/proc/{pid}/comm").read_bytes():
                os.kill(int(pid), signal.SIGKILL)
    assert sing("exec", locked, "echo", "again", env=env).stdout == "again\n"
    deadline = time.monotonic() + 40
    while place in sockets(as_user):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_unpacked_image_is_in_memory_only(sing, as_user, locked):
    script = "md5sum /opt/noise; touch /opt/x 2>&1; ls -ld /opt | tr -s ' ' | cut -d ' ' -f 3"
    result = sing("exec", "--unsquash", locked, "sh", "-c", script, env=KEY)
    assert noise_sum(result) == SUM
    assert "Read-only file system" in result.stdout
    assert result.stdout.split()[-1] in (as_user.name, str(as_user.uid), as_user.name[:8])
    found = [
        path for path in (as_user.tmp / "cache").rglob("*") if path.is_file() and b"plain text" in path.read_bytes()
    ]
    assert found == []


@pytest.mark.fuse
def test_instance_of_an_encrypted_image(sing, locked, fuse):
    sing("instance", "start", locked, "vault", env=KEY, check=True)
    try:
        assert noise_sum(sing("exec", "instance://vault", "md5sum", "/opt/noise")) == SUM
        logs = sing("instance", "list", "--json").stdout
        assert SECRET not in logs
    finally:
        sing("instance", "stop", "vault")


@pytest.mark.fuse
def test_user_with_subordinate_ids_does_all_of_it_too(as_subuid_user, locked, box, fuse):
    program = ["singularity"]
    for words in ([], ["--fakeroot"], ["--unsquash"]):
        result = as_subuid_user([*program, "exec", *words, locked, "md5sum", "/opt/noise"], env=KEY)
        assert noise_sum(result) == SUM
    as_subuid_user([*program, "build", "--encrypt", "own.sif", locked], env=KEY, check=True)
    assert noise_sum(as_subuid_user([*program, "exec", "own.sif", "md5sum", "/opt/noise"], env=KEY)) == SUM


@pytest.mark.fuse
def test_changes_over_an_encrypted_image(sing, locked, fuse):
    script = "echo new > /opt/text && cat /opt/text"
    assert sing("exec", "--writable-tmpfs", locked, "sh", "-c", script, env=KEY).stdout == "new\n"
    assert sing("exec", "--fakeroot", locked, "id", "-u", env=KEY).stdout == "0\n"


def test_conversions_take_the_key(sing, locked, tool):
    for words, env in (((), {}), ((), OTHER)):
        assert sing("convert", *words, locked, "plain.sif", env=env).returncode == 255
    sing("convert", locked, "plain.sif", env=KEY, check=True)
    assert "Squashfs" in sing("sif", "list", "plain.sif", check=True).stdout
    sing("convert", "--to", "docker-archive", "--passphrase", locked, "a.tar", input=f"{SECRET}\n", check=True)
    names = subprocess.run([tool("tar"), "-tf", locked.parent / "a.tar"], capture_output=True, text=True, check=True)
    assert "manifest.json" in names.stdout


def test_inspect_needs_no_key(sing, locked):
    assert sing("inspect", "--runscript", locked, check=True).stdout.startswith("#!/bin/sh")
    assert "Gocryptfs squashfs" in sing("sif", "list", locked, check=True).stdout


# -- damage and malice -----------------------------------------------------------------------------------------------


def places(path: Path) -> tuple[int, int]:
    """Return where the partition lies."""
    with open_image(str(path)) as image:
        return image.offset, image.size


@pytest.mark.fuse
def test_altered_block_is_an_input_error_and_everything_else_is_right(sing, locked, fuse):
    offset, _ = places(locked)
    data = bytearray(locked.read_bytes())
    # Noise does not get smaller and comes last: most of the second half of the image.
    data[offset + (len(data) - offset) * 4 // 5] ^= 1
    locked.write_bytes(data)
    script = "md5sum /opt/text; md5sum /opt/noise; md5sum /bin/busybox"
    result = sing("exec", locked, "sh", "-c", script, env=KEY)
    text = hashlib.md5(b"the plain text of it all\n" * 4000).hexdigest()
    program = hashlib.md5((locked.parent / "box/bin/busybox").read_bytes()).hexdigest()
    sums = {line.split()[1]: line.split()[0] for line in result.stdout.splitlines()}
    assert sums == {"/opt/text": text, "/bin/busybox": program}
    assert "/opt/noise: I/O error" in result.stderr or "Input/output error" in result.stderr


def test_truncated_image_is_refused(sing, locked):
    data = locked.read_bytes()
    locked.write_bytes(data[: len(data) // 2])
    result = sing("exec", locked, "true", env=KEY)
    assert result.returncode == 255 and "FATAL" in result.stderr and "Traceback" not in result.stderr


def outer(path: Path, files: dict[str, bytes | str]) -> Path:
    """Write a SIF file with an encrypted partition that holds these files (a text is the target of a link)."""
    objects = [SifObject(layout.PARTITION, extra=layout.partition_extra(6, layout.PRIMARY, layout.host_arch()))]
    start = plan(objects)[-1]
    with open(path, "w+b") as file:
        with SquashfsWriter(file.fileno(), start) as writer:
            root = Node("dir", 0o755)
            for name, content in files.items():
                if isinstance(content, str):
                    node = Node("symlink", 0o777, target=content.encode())
                else:
                    node = Node("file", 0o644, data=writer.store_bytes(content))
                root.children[name.encode()] = node
            objects[0].offset, objects[0].size = start, writer.finish(root)
        create(file.fileno(), objects, identity=bytes(16))
    path.chmod(0o644)
    return path


CONF = Conf.make(SECRET.encode(), bytes(32), n=1024).text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "without gocryptfs.conf"),
        ({"gocryptfs.conf": "/etc/passwd", "squashfs-1": b"x"}, "without gocryptfs.conf"),
        ({"gocryptfs.conf": CONF}, "with 0 files"),
        ({"gocryptfs.conf": CONF, "squashfs-1": "/dev/zero"}, "with 0 files"),
        ({"gocryptfs.conf": CONF, "squashfs-1": b"a", "squashfs-2": b"b"}, "with 2 files"),
        ({"gocryptfs.conf": CONF, "squashfs-1": b""}, "cut short"),
        ({"gocryptfs.conf": CONF, "squashfs-1": bytes(40)}, "cut short"),
        ({"gocryptfs.conf": CONF, "squashfs-1": bytes(400)}, "unknown version"),
        ({"gocryptfs.conf": CONF, "squashfs-1": b"\0\2" + bytes(400)}, "altered"),
        ({"gocryptfs.conf": b"{" * 60000, "squashfs-1": b"x"}, "conf is damaged"),
        ({"gocryptfs.conf": bytes(70000), "squashfs-1": b"x"}, "70000 bytes"),
        ({"gocryptfs.conf": CONF.replace(b"1024", b"1099511627776"), "squashfs-1": b"x"}, "out of all bounds"),
    ],
)
def test_hostile_partition_is_refused_in_one_line(sing, as_plain_user, user_space, files, said):
    path = outer(as_plain_user.tmp / "bad.sif", files)
    result = as_plain_user(["singularity", "exec", path, "true"], env=KEY)
    assert result.returncode == 255
    assert said in result.stderr and result.stderr.count("\n") <= 2, result.stderr


def test_key_of_another_length_than_the_message_is_an_error(sing, box, keys, as_user, tool):
    sing("build", "--pem-path", keys[1], "rsa.sif", box, check=True)
    as_user([tool("openssl"), "genrsa", "-out", "big.pem", "3072"], check=True)
    result = sing("exec", "--pem-path", "big.pem", "rsa.sif", "true")
    assert result.returncode == 255
    assert "cannot be decrypted with the key of big.pem" in result.stderr


# -- root, and the peer ----------------------------------------------------------------------------------------------


@pytest.mark.root
def test_root_of_the_machine_runs_them_too(root_only, locked):
    program = BIN / "singularity"
    for words in ((), ("--unsquash",)):
        result = subprocess.run(
            [program, "exec", *words, locked, "md5sum", "/opt/noise"],
            env={**os.environ, **KEY},
            capture_output=True,
            text=True,
            check=False,
        )
        assert noise_sum(result) == SUM


@pytest.fixture
def public_tmp():
    """A folder below /tmp that everybody may use: the peer sees it under the same name."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.peer
@pytest.mark.root
@pytest.mark.fuse
def test_apptainer_runs_what_we_encrypt(root_only, apptainer, sing, locked, box, keys, public_tmp, monkeypatch):
    _, public = keys
    sing("build", "--pem-path", public, "rsa.sif", box, check=True)
    for name in ("locked.sif", "rsa.sif", "key.pem"):
        (public_tmp / name).write_bytes((locked.parent / name).read_bytes())
        (public_tmp / name).chmod(0o644)
    opened = apptainer(
        "exec", "--pem-path", public_tmp / "key.pem", public_tmp / "rsa.sif", "md5sum", "/opt/noise", user=True
    )
    assert opened.stdout.split()[:1] == [SUM], opened.stderr
    monkeypatch.setenv("APPTAINER_ENCRYPTION_PASSPHRASE", SECRET)
    assert apptainer("exec", public_tmp / "locked.sif", "md5sum", "/opt/noise", user=True).stdout.split()[:1] == [SUM]


@pytest.mark.peer
@pytest.mark.root
@pytest.mark.fuse
def test_we_run_what_apptainer_encrypts(root_only, apptainer, sing, locked, box, keys, public_tmp, monkeypatch):
    private, public = keys
    subprocess.run(["cp", "-r", box, public_tmp / "box"], check=True)
    (public_tmp / "public.pem").write_bytes(public.read_bytes())
    subprocess.run(["chown", "-R", "1000:1000", public_tmp / "box", public_tmp / "public.pem"], check=True)
    made = apptainer(
        "build", "--pem-path", public_tmp / "public.pem", public_tmp / "rsa.sif", public_tmp / "box", user=True
    )
    assert made.returncode == 0, made.stderr
    monkeypatch.setenv("APPTAINER_ENCRYPTION_PASSPHRASE", SECRET)
    made = apptainer("build", "--encrypt", public_tmp / "pass.sif", public_tmp / "box", user=True)
    assert made.returncode == 0, made.stderr
    assert noise_sum(sing("exec", public_tmp / "pass.sif", "md5sum", "/opt/noise", env=KEY)) == SUM
    assert noise_sum(sing("exec", "--pem-path", private, public_tmp / "rsa.sif", "md5sum", "/opt/noise")) == SUM
    assert noise_sum(sing("exec", "--unsquash", public_tmp / "pass.sif", "md5sum", "/opt/noise", env=KEY)) == SUM
