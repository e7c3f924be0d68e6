# SPDX-License-Identifier: Apache-2.0
"""What can be asked of a build besides its recipe: every flag does what its help says."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess

import pytest

from pysingularity.image.inside import squashfs_of
from pysingularity.image.open import open_image
from traces import leftovers

pytestmark = pytest.mark.rootless

RECIPE = """\
Bootstrap: localimage
From: {base}

%setup
    echo setup > "$SINGULARITY_ROOTFS/opt/setup"

%files
    data /opt/data

%post
    echo post > /opt/post

%environment
    export SEEN=yes

%labels
    Owner new

%runscript
    echo runs

%test
    echo test > /opt/test
"""


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request):
    return request.getfixturevalue(request.param)


def build(user, *words, text: str | None = None, base=None, env=None, status: int = 0, **options):
    if text is not None:
        user.write("x.def", text.format(base=base))
    user.write("data", "data")
    done = user(["singularity", "build", *words], env={"SINGULARITY_TMPDIR": str(user.tmp), **(env or {})}, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert leftovers(user) == []
    return done


def test_test_may_write_only_into_memory(as_user, base):
    said = build(as_user, "x.sif", "x.def", text=RECIPE, base=base, status=255).stderr
    assert "%test ended with status" in said and "--notest" in said
    build(as_user, "--writable-tmpfs", "x.sif", "x.def")
    assert as_user(["singularity", "exec", "x.sif", "ls", "/opt"], check=True).stdout.split() == [
        "data",
        "post",
        "setup",
    ]


@pytest.mark.parametrize("flag", ["--notest", "-T"])
def test_notest_builds_without_it(as_user, base, flag):
    build(as_user, flag, "x.sif", "x.def", text=RECIPE, base=base)


@pytest.mark.parametrize(
    ("names", "made", "seen", "runs"),
    [
        ("none", [], "", False),
        ("setup", ["setup"], "", False),
        ("files,environment", ["data"], "yes", False),
        ("post", ["post"], "", False),
        ("post,runscript", ["post"], "", True),
    ],
)
def test_section_follows_only_those_that_are_named(as_user, base, names, made, seen, runs):
    build(as_user, "--sandbox", "--section", names, "box", "x.def", text=RECIPE, base=base)
    assert sorted(path.name for path in (as_user.tmp / "box/opt").iterdir()) == made
    found = as_user(["singularity", "exec", "box", "sh", "-c", 'echo "$SEEN"'], check=True)
    assert found.stdout == f"{seen}\n"
    script = as_user.tmp / "box/.singularity.d/runscript"
    assert (script.exists() and "echo runs" in script.read_text()) == runs


def test_section_of_an_update_leaves_the_rest_alone(user, base):
    build(user, "--sandbox", "--notest", "box", "x.def", text=RECIPE, base=base)
    (user.tmp / "box/opt/data").unlink()
    build(user, "--sandbox", "--update", "--section", "environment,labels", "box", "x.def")
    assert not (user.tmp / "box/opt/data").exists()
    said = build(user, "--update", "box", "x.def", status=1).stderr
    assert "--update works on sandboxes" in said
    said = build(user, "--sandbox", "--update", "nosuch", "x.def", status=255).stderr
    assert "an existing sandbox" in said
    user(["singularity", "rm", "box"], check=True)


def test_force_replaces_target_and_labels(as_user, base):
    build(as_user, "--notest", "base.sif", "x.def", text=RECIPE.replace("Owner new", "Owner old"), base=base)
    text = "Bootstrap: localimage\nFrom: base.sif\n%post\n  true\n%labels\n  Owner new\n"
    said = build(as_user, "x.sif", "x.def", text=text).stderr
    assert "label Owner" in said and "--force replaces it" in said
    assert "Owner: old" in as_user(["singularity", "inspect", "x.sif"], check=True).stdout
    assert "exists already" in build(as_user, "x.sif", "x.def", status=255).stderr
    build(as_user, "--force", "x.sif", "x.def")
    assert "Owner: new" in as_user(["singularity", "inspect", "x.sif"], check=True).stdout


def test_fix_perms_lets_the_owner_read_and_enter_everything(user, base):
    text = (
        "Bootstrap: localimage\nFrom: {base}\n%post\n  mkdir -p /opt/deep/er\n  echo x > /opt/deep/er/file\n"
        "  chmod 0 /opt/deep/er/file /opt/deep/er /opt/deep\n"
    )
    build(user, "--sandbox", "--fix-perms", "box", "x.def", text=text, base=base)
    assert (user.tmp / "box/opt/deep/er/file").stat().st_mode & 0o777 == 0o600
    assert (user.tmp / "box/opt/deep").stat().st_mode & 0o777 == 0o700
    build(user, "--fix-perms", "x.sif", "x.def")
    with open_image(str(user.tmp / "x.sif")) as image:
        assert squashfs_of(image).lookup("opt/deep/er/file").mode & 0o777 == 0o600
    build(user, "--force", "x.sif", "x.def")
    with open_image(str(user.tmp / "x.sif")) as image:
        assert squashfs_of(image).lookup("opt/deep/er/file").mode & 0o777 == 0


def test_bind_and_mount_are_for_post_and_test_alone(user, base):
    user.write("one/x", "first")
    user.write("two/x", "second")
    text = (
        "Bootstrap: localimage\nFrom: {base}\n%post\n  cat /one/x /two/x > /opt/x\n  ! touch /two/y\n  touch /one/y\n"
        "%test\n  test -e /one/x\n  test -e /two/x\n"
    )
    mount = f"type=bind,src={user.tmp}/two,dst=/two,ro"
    build(user, "--bind", f"{user.tmp}/one:/one", "--mount", mount, "--sandbox", "box", "x.def", text=text, base=base)
    assert (user.tmp / "box/opt/x").read_text() == "firstsecond"
    assert list((user.tmp / "box/one").iterdir()) == [] and (user.tmp / "one/y").stat().st_uid == user.uid
    for words, told in (
        (["--bind", "/nosuch:/x"], "/nosuch"),
        (["--mount", "type=cake,src=/etc,dst=/x"], "type"),
        (["--bind", f"{user.tmp}:relative"], "absolute path"),
    ):
        assert told in build(user, *words, "y.sif", "x.def", status=255).stderr
    user(["singularity", "rm", "box"], check=True)


def test_nv_without_a_driver_is_said_and_no_error(as_user, base):
    text = "Bootstrap: localimage\nFrom: {base}\n%post\n  ls /dev > /opt/dev\n"
    done = build(as_user, "--nv", "--sandbox", "box", "x.def", text=text, base=base)
    if not os.path.exists("/dev/nvidia0"):
        assert "--nv" in done.stderr
    assert "null" in (as_user.tmp / "box/opt/dev").read_text().split()


def test_nv_brings_what_the_driver_has(as_user, base, monkeypatch, tmp_path):
    """The libraries and devices that were found are mounted; finding them is tested with the runtime."""
    from pysingularity.build.container import gpu_mounts
    from pysingularity.runtime import gpu

    found = gpu.Gpu("nvidia")
    found.libraries.append(("libcuda.so.1", "/lib/libcuda.so.535"))
    found.devices.append("/dev/nvidia0")
    found.files.append(("/usr/bin/nvidia-smi", True))
    monkeypatch.setattr(gpu, "nvidia", lambda: found)
    mounts = [(one.target, one.source, one.trusted) for one in gpu_mounts()]
    assert ("/.singularity.d/libs/libcuda.so.1", "/lib/libcuda.so.535", False) in mounts
    assert ("/dev/nvidia0", "/dev/nvidia0", True) in mounts
    assert ("/usr/bin/nvidia-smi", "/usr/bin/nvidia-smi", False) in mounts


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (["--encrypt"], "no key was given"),
        (["--encrypt", "--passphrase"], "the passphrase is empty"),
        (["--pem-path", "nosuch.pem"], "nosuch.pem: no such file"),
        (["--pem-path", "x.def"], "holds no public key"),
        (["--encrypt", "--sandbox"], "a folder is not encrypted"),
        (["--remote"], "no remote builder"),
        (["--rocm"], "--bind"),
        (["--docker-login"], "registry login"),
        (["--arch-variant", "v7"], "digest"),
    ],
)
def test_what_is_not_there_is_refused_before_any_work(as_user, base, flag, words):
    said = build(as_user, *flag, "x.sif", "x.def", text=RECIPE, base=base, status=255).stderr
    assert words in said and "[1/" not in said
    assert not (as_user.tmp / "x.sif").exists()


def test_mksquashfs_args_reach_the_image(as_user, base, tool):
    text = "Bootstrap: localimage\nFrom: {base}\n%post\n  true\n"
    words = "-comp zstd -Xcompression-level 3 -b 64K -processors 1"
    build(as_user, "--mksquashfs-args", words, "x.sif", "x.def", text=text, base=base)
    with open_image(str(as_user.tmp / "x.sif")) as image:
        offset = squashfs_of(image).offset if hasattr(squashfs_of(image), "offset") else image.offset
    told = subprocess.run(
        [tool("unsquashfs"), "-s", "-o", str(offset), as_user.tmp / "x.sif"], capture_output=True, text=True, check=True
    ).stdout
    assert "Compression zstd" in told and "Block size 65536" in told
    said = build(as_user, "--mksquashfs-args", "-ef x", "y.sif", "x.def", status=1).stderr
    assert "has no counterpart" in said


def test_build_arguments_come_from_flags_and_files(as_user, base):
    text = "Bootstrap: localimage\nFrom: {base}\n%arguments\n  A=1\n  B=2\n"
    text += "%post\n  echo {{{{ A }}}} {{{{ B }}}} > /opt/ab\n"
    as_user.write("args", "A=3\nB=4\n")
    build(as_user, "--sandbox", "--build-arg-file", "args", "--build-arg", "B=5", "box", "x.def", text=text, base=base)
    assert (as_user.tmp / "box/opt/ab").read_text() == "3 5\n"


def test_same_recipe_and_epoch_give_the_same_bytes(user, base):
    """Two builds in other folders, a second apart: nothing of the moment or the place is in it."""
    text = (
        "Bootstrap: localimage\nFrom: {base}\n%files\n  data /opt/\n%post\n  echo made > /opt/made\n"
        "  mkdir -p /opt/d\n  chown 5:6 /opt/d /opt/made\n  ln -s made /opt/link\n  mknod /opt/null c 1 3\n"
        "%labels\n  A b\n%environment\n  export A=b\n%runscript\n  echo hi\n%test\n  test -e /opt/made\n"
    )
    env = {"SOURCE_DATE_EPOCH": "1700000000"}
    found = []
    for name in ("one", "two"):
        user.write(f"{name}/x", "")
        tmp = {"SINGULARITY_TMPDIR": str(user.tmp / name), "SINGULARITY_CACHEDIR": str(user.tmp / name / "cache")}
        build(user, "--force", "x.sif", "x.def", text=text, base=base, env={**env, **tmp})
        found.append((user.tmp / "x.sif").read_bytes())
        user(["sleep", "1.1"])
    assert found[0] == found[1]
    labels = json.loads(user(["singularity", "inspect", "--json", "x.sif"], check=True).stdout)
    assert "2023" in labels["data"]["attributes"]["labels"]["org.label-schema.build-date"]
    said = build(user, "--force", "x.sif", "x.def", env={"SOURCE_DATE_EPOCH": "soon"}, status=255).stderr
    assert "SOURCE_DATE_EPOCH=soon" in said


def test_way_to_be_root_does_not_show_in_the_image(as_subuid_user, user_space, base):
    """One recipe, every way that keeps owners, the same bytes; real root's as well when it started the tests."""
    text = (
        "Bootstrap: localimage\nFrom: {base}\n%post\n  echo x > /opt/x\n  chown 5:6 /opt/x\n  chmod 4750 /opt/x\n"
        "  ln -s x /opt/l\n  chown -h 7:8 /opt/l\n  mknod -m 640 /opt/null c 1 3\n  chown 0:6 /opt/null\n"
        "  mkdir -m 2775 /opt/d\n  chown 9:9 /opt/d\n  touch /opt/d/inherits\n"
    )
    own = as_subuid_user.tmp / "own"
    shutil.copytree(base, own, symlinks=True)
    for path in (own, *own.rglob("*")):
        as_subuid_user.own(path)
    as_subuid_user(["singularity", "build", "base.sif", own], check=True)
    as_subuid_user.write("x.def", text.format(base=as_subuid_user.tmp / "base.sif"))
    found = {}
    for way in ("subuid", "notify"):
        env = {"SINGULARITY_ROOTLESS": way, "SOURCE_DATE_EPOCH": "1700000000"}
        build(as_subuid_user, "--force", "x.sif", "x.def", env=env)
        found[way] = (as_subuid_user.tmp / "x.sif").read_bytes()
    if os.getuid() == 0:
        root = type(as_subuid_user)(pwd.getpwuid(0), user_space)
        root.write("x.def", (as_subuid_user.tmp / "x.def").read_text())
        build(root, "x.sif", "x.def", env={"SOURCE_DATE_EPOCH": "1700000000"})
        found["root"] = (root.tmp / "x.sif").read_bytes()
    with open_image(str(as_subuid_user.tmp / "x.sif")) as image:
        node = squashfs_of(image).lookup("opt/x")
        assert (node.uid, node.gid, node.mode & 0o7777) == (5, 6, 0o4750)
    assert set(found.values()) == {found["subuid"]}


@pytest.mark.network
@pytest.mark.long
@pytest.mark.parametrize("kind", ["as_subuid_user", "as_plain_user"])
def test_another_architecture_is_built_by_its_emulator(request, kind):
    """A Debian for ARM with a package on top; needs qemu-user that is registered with flag F."""
    from pysingularity.build import foreign

    own = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")
    other = "arm64" if own == "amd64" else "amd64"
    found = foreign.emulator(other)
    if found is None or not found.fixed:
        pytest.skip(f"needs an emulator for {other} in binfmt_misc (package qemu-user-static)")
    user = request.getfixturevalue(kind)
    text = (
        "Bootstrap: debootstrap\n%post\n  dpkg --print-architecture\n  chown 5:6 /opt\n  stat -c 'owner %u:%g' /opt\n"
    )
    done = build(user, "--arch", other, "x.sif", "x.def", text=text, timeout=1800)
    assert f"\n{other}\n" in done.stderr and "owner 5:6" in done.stderr
    ran = user(["singularity", "exec", "x.sif", "uname", "-m"], timeout=60)
    assert ran.stdout.strip() == {"arm64": "aarch64", "amd64": "x86_64"}[other], ran.stderr
