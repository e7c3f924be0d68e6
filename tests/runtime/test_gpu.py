# SPDX-License-Identifier: Apache-2.0
"""--nv, --rocm and --device on a machine without a GPU: stub libraries with the right names, and the real ldconfig."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import HostError, UserError
from pysingularity.runtime import elf, gpu

LIBC = Path("/lib") / f"{os.uname().machine}-linux-gnu" / "libc.so.6"


def stub(path: Path, needs: str = "") -> Path:
    """A shared library with the soname of its file name; `needs` adds a reference to a versioned symbol."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("needs the program gcc")
    source = (
        f"#include <{needs}.h>\nvoid *stub(void) {{ return (void *)0; }}\n" if needs else "int stub(void){return 0;}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [gcc, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def host(tmp_path, tool):
    """A root with two stub libraries in a linker cache made by ldconfig, a program and device nodes."""
    for name in ("libcuda.so.1", "libnvidia-ml.so.1", "libc.so.6", "libunrelated.so.1"):
        stub(tmp_path / "usr/lib" / name)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/ld.so.conf").write_text("/usr/lib\n")
    subprocess.run([tool("ldconfig"), "-r", str(tmp_path)], check=True, capture_output=True)
    (tmp_path / "usr/bin").mkdir()
    (tmp_path / "usr/bin/nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "usr/bin/nvidia-smi").chmod(0o755)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm", "kfd", "null"):
        (tmp_path / "dev" / name).touch()
    return str(tmp_path)


def test_nv_finds_libraries_programs_and_nodes(host):
    found = gpu.nvidia(host)
    assert [name for name, _ in found.libraries] == ["libcuda.so.1", "libnvidia-ml.so.1"]
    assert (f"{host}/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi") in found.files
    assert found.devices == ["/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidiactl"]
    assert found.missing == []


def test_rocm_takes_its_own_nodes(host):
    assert gpu.rocm(host).devices == ["/dev/kfd"]


def test_host_without_gpu_says_what_is_missing(tmp_path):
    found = gpu.nvidia(str(tmp_path))
    assert found.libraries == []
    assert len(found.missing) == 2


def test_linker_cache_agrees_with_ldconfig(tool):
    machine = os.uname().machine
    lines = subprocess.run([tool("ldconfig"), "-p"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    judge = {line.split()[0] for line in lines if "(libc6,x86-64" in line}
    if machine != "x86_64" or not judge:
        pytest.skip("compares the names of x86-64 libraries")
    assert set(elf.parse_cache(Path("/etc/ld.so.cache").read_bytes(), machine)) == judge


def test_library_that_needs_a_newer_glibc_is_left_out_with_a_reason(tmp_path):
    library = versioned(tmp_path / "libcuda.so.1", "GLIBC_2.99")
    found = gpu.Gpu("nvidia")
    found.libraries = [("libcuda.so.1", str(library))]
    found.for_image(LIBC.read_bytes())
    assert found.libraries == []
    assert found.left_out[0][0] == "libcuda.so.1"
    assert "needs glibc 2.99" in found.left_out[0][1]


def test_library_that_the_image_can_load_stays(tmp_path):
    library = versioned(tmp_path / "libcuda.so.1", "GLIBC_2.17")
    found = gpu.Gpu("nvidia")
    found.libraries = [("libcuda.so.1", str(library))]
    found.for_image(LIBC.read_bytes())
    assert found.left_out == []


def test_image_without_glibc_gets_no_library_that_needs_it(tmp_path):
    found = gpu.Gpu("nvidia")
    found.libraries = [("libcuda.so.1", str(versioned(tmp_path / "libcuda.so.1", "GLIBC_2.17")))]
    found.for_image(None)
    assert "no glibc" in found.left_out[0][1]


def test_versions_of_the_real_libc_are_read():
    names = elf.versions(LIBC.read_bytes(), elf.VERDEF)
    assert "GLIBC_2.17" in names
    assert elf.glibc(names) >= (2, 17)


def versioned(path: Path, version: str) -> Path:
    """A minimal ELF file whose only content is one version requirement."""
    strings = b"\0libc.so.6\0" + version.encode() + b"\0"
    need = struct.pack("<HHIII", 1, 1, 1, 16, 0) + struct.pack("<IHHII", 0, 0, 2, 11, 0)
    body = 64
    header = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 0, 0, 64, 0, 0, 64, 3, 0)
    table = body + len(need) + len(strings)
    header = header[:40] + struct.pack("<Q", table) + header[48:]

    def section(kind, offset, size, link=0):
        return struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 1, 0, 0)

    sections = section(0, 0, 0) + section(elf.VERNEED, body, len(need), 2) + section(3, body + len(need), len(strings))
    path.write_bytes(header + need + strings + sections)
    return path


def named(path: Path, name: str) -> Path:
    """A minimal ELF file whose only content is its soname."""
    strings = b"\0" + name.encode() + b"\0"
    strings += bytes(-len(strings) % 8)
    dynamic = struct.pack("<QQQQ", elf.DT_SONAME, 1, 0, 0)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    table = 64 + len(dynamic) + len(strings)
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 0)

    def section(kind, offset, size, link=0):
        return struct.pack("<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 1, 0, 0)

    sections = section(0, 0, 0) + section(elf.DYNAMIC, 64, len(dynamic), 2)
    path.write_bytes(header + dynamic + strings + sections + section(3, 64 + len(dynamic), len(strings)))
    return path


def test_soname_of_a_real_library_is_read():
    assert elf.soname(LIBC.read_bytes()) == "libc.so.6"


def nvidia_specification(folder: Path) -> Path:
    """What `nvidia-ctk cdi generate` writes, cut down: versioned libraries, and hooks that link and index them."""
    library = named(folder / "libcuda.so.550.54", "libcuda.so.1")
    inside = "/usr/lib/x86_64-linux-gnu"
    links = ["libcuda.so.1::/usr/lib/x86_64-linux-gnu/libcuda.so", "../nothing.so.1::/usr/lib/elsewhere/nothing.so"]
    hook = {"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook"}
    edits = {
        "deviceNodes": [{"path": "/dev/null"}],
        "env": ["NVIDIA_VISIBLE_DEVICES=void"],
        "mounts": [
            {"hostPath": str(library), "containerPath": f"{inside}/libcuda.so.550.54", "options": ["ro", "bind"]}
        ],
        "hooks": [
            {**hook, "args": ["nvidia-cdi-hook", "create-symlinks", "--link", links[0], f"--link={links[1]}"]},
            {**hook, "args": ["nvidia-cdi-hook", "update-ldcache", "--folder", inside]},
        ],
    }
    device = {"name": "all", "containerEdits": {}}
    value = {"cdiVersion": "0.6.0", "kind": "nvidia.com/gpu", "containerEdits": edits, "devices": [device]}
    (folder / "nvidia.json").write_text(json.dumps(value))
    return library


def test_hooks_that_link_libraries_are_done_by_binding_them_under_their_names(tmp_path):
    library = nvidia_specification(tmp_path)
    found = gpu.cdi(["nvidia.com/gpu=all"], [str(tmp_path)])
    assert sorted(found.libraries) == [("libcuda.so", str(library)), ("libcuda.so.1", str(library))]
    assert found.files == [(str(library), "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54")]


@pytest.mark.rootless
@pytest.mark.parametrize("options", [[], ["--contain"]])
def test_container_with_a_cdi_device(sing, as_user, box, options):
    folder = as_user.tmp / "cdi"
    folder.mkdir()
    nvidia_specification(folder)
    script = (
        "ls /.singularity.d/libs; cat /.singularity.d/libs/libcuda.so.1 | head -c 4 | tail -c 3; echo; "
        "ls /usr/lib/x86_64-linux-gnu; echo $LD_LIBRARY_PATH $NVIDIA_VISIBLE_DEVICES"
    )
    words = [*options, "--device", "nvidia.com/gpu=all", "--cdi-dirs", folder, box, "sh", "-c", script]
    result = sing("exec", *words)
    expected = "libcuda.so libcuda.so.1 ELF libcuda.so.550.54 /.singularity.d/libs void".split()
    assert result.stdout.split() == expected, result.stderr


@given(st.binary(max_size=400))
def test_damaged_elf_files_promise_nothing(data):
    assert isinstance(elf.versions(b"\x7fELF\x02\x01" + data, elf.VERNEED), set)
    assert isinstance(elf.soname(b"\x7fELF\x02\x01" + data), str)


@given(st.binary(max_size=200))
def test_damaged_linker_cache_is_a_value_error_or_empty(data):
    try:
        assert isinstance(elf.parse_cache(elf.CACHE_MAGIC + data, "x86_64"), dict)
    except ValueError:
        pass


def test_cdi_device_brings_its_edits_and_those_of_the_whole_specification(tmp_path):
    edits = {"mounts": [{"hostPath": "/h/lib.so", "containerPath": "/c/lib.so"}], "env": ["A=1"]}
    device = {"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/thing0"}]}}
    specification = {"cdiVersion": "0.6.0", "kind": "lab.org/gpu", "containerEdits": edits, "devices": [device]}
    (tmp_path / "lab.json").write_text(json.dumps(specification))
    found = gpu.cdi(["lab.org/gpu=0"], [str(tmp_path)])
    assert found.devices == ["/dev/thing0"]
    assert found.files == [("/h/lib.so", "/c/lib.so")]
    assert found.environment == {"A": "1"}


@pytest.mark.parametrize("name", ["gpu", "gpu=0", "lab.org/gpu=", "lab.org/gpu=7"])
def test_unknown_or_malformed_device_is_the_users_error(tmp_path, name):
    with pytest.raises(UserError):
        gpu.cdi([name], [str(tmp_path)])


def test_damaged_specification_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(HostError, match=r"bad\.json"):
        gpu.cdi(["lab.org/gpu=0"], [str(tmp_path)])


def linker_cache(libraries: list[Path]) -> bytes:
    """A cache of the dynamic linker (glibc's elf/cache.c) that knows these libraries by their file names."""
    flags = elf.CACHE_FLAGS[os.uname().machine]
    head, entries, strings = 48, b"", b""
    start = head + 24 * len(libraries)
    for path in libraries:
        key, value = start + len(strings), start + len(strings) + len(path.name) + 1
        strings += os.fsencode(path.name) + b"\0" + os.fsencode(path) + b"\0"
        entries += struct.pack("<iIIIQ", flags, key, value, 0, 0)
    return elf.CACHE_MAGIC + struct.pack("<II20x", len(libraries), len(strings)) + entries + strings


FAKE_HOST = """
set -e
mount --bind $TOP/cache /etc/ld.so.cache
mkdir -p $TOP/dev
for node in null zero random urandom tty full fuse; do
    [ ! -e /dev/$node ] || {{ touch $TOP/dev/$node; mount --bind /dev/$node $TOP/dev/$node; }}
done
for node in nvidia0 nvidiactl nvidia-uvm kfd; do touch $TOP/dev/$node; mount --bind /dev/null $TOP/dev/$node; done
ln -sfn /proc/self/fd $TOP/dev/fd
mount --rbind $TOP/dev /dev
mount --bind $TOP/bin /usr/local/bin
exec setpriv --reuid {uid} --regid {gid} --clear-groups "$@"
"""


@pytest.mark.rootless
@pytest.mark.parametrize("options", [[], ["--contain"], ["-C"]])
def test_container_on_a_host_with_stubs_of_a_driver(root_only, as_user, box, options):
    """A private view of this host: a linker cache, device nodes and a program, as a driver installs them."""
    top = as_user.tmp / "driver"
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (top / "lib").mkdir(parents=True, exist_ok=True)
        named(top / "lib" / name, name)
    versioned(top / "lib/libnvoptix.so.1", "GLIBC_2.99")
    named(top / "lib/libnvcuvid.so.1", "libnvcuvid.so.1")
    (top / "cache").write_bytes(linker_cache(sorted((top / "lib").iterdir())))
    (top / "bin").mkdir()
    (top / "bin/nvidia-smi").write_text("#!/bin/sh\necho smi\n")
    (top / "bin/nvidia-smi").chmod(0o755)
    script = "ls /.singularity.d/libs; nvidia-smi; ls /dev | grep -c nvidia; echo $LD_LIBRARY_PATH"
    words = ["singularity", "exec", "--nv", *options, box, "sh", "-c", script]
    start = ["unshare", "-m", "sh", "-c", FAKE_HOST.format(uid=as_user.uid, gid=as_user.gid), "sh", *map(str, words)]
    environ = {**as_user.environ, "TOP": str(top)}
    result = subprocess.run(start, env=environ, capture_output=True, text=True, cwd=as_user.tmp, check=False)
    libraries = ["libcuda.so.1", "libnvcuvid.so.1", "libnvidia-ml.so.1"]
    assert result.stdout.split() == [*libraries, "smi", "3", "/.singularity.d/libs"], result.stderr
    assert result.stderr.splitlines() == [
        "WARNING: --nv: libnvoptix.so.1 left out: needs glibc 2.99, the image has no glibc"
    ]
    doctor = subprocess.run(
        [*start[:6], "singularity", "doctor", "--json"], env=environ, capture_output=True, text=True, check=False
    )
    assert doctor.stdout, doctor.stderr
    (check,) = [one for one in json.loads(doctor.stdout)["checks"] if one["id"] == "nvidia"]
    assert check["state"] == "ok"
    assert "libcuda.so.1" in check["detail"]
    assert "/dev/nvidia0" in check["detail"]


@pytest.mark.rootless
@pytest.mark.parametrize("option", ["--nv", "--rocm"])
def test_no_gpu_is_a_warning_and_no_error(sing, box, option):
    if os.path.exists("/dev/nvidia0") or os.path.exists("/dev/kfd"):
        pytest.skip("this machine has a GPU")
    result = sing("exec", option, box, "echo", "runs")
    assert (result.returncode, result.stdout) == (0, "runs\n")
    assert result.stderr.startswith("WARNING: ")
