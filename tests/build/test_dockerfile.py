# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles built by ordinary users, from a registry on loopback and from folders, without any daemon."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import subprocess
import tarfile
import threading

import pytest

from registries import FakeRegistry

pytestmark = pytest.mark.rootless

CONFIG = {
    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", "FROM_BASE=yes"],
    "Cmd": ["/bin/sh"],
    "Labels": {"base": "1"},
    "WorkingDir": "/opt",
}


@pytest.fixture(scope="module")
def layer(tiny) -> bytes:
    """The small root as a layer, with two users."""

    def name(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.add(tiny, ".", filter=name)
        for path, text in (
            ("etc/passwd", "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n"),
            ("etc/group", "root:x:0:\napp:x:1000:\nextra:x:50:app\n"),
        ):
            info = tarfile.TarInfo(path)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return gzip.compress(out.getvalue(), 1)


@pytest.fixture(scope="module")
def registry(layer):
    one = FakeRegistry()
    one.add([layer], config={"config": CONFIG})
    one.add(
        [layer], tag="onbuild", config={"config": {**CONFIG, "OnBuild": ["COPY part /from-trigger", "RUN touch /ran"]}}
    )
    yield one
    one.close()


@pytest.fixture
def image(registry) -> str:
    return f"{registry.host}/a/b:1"


@pytest.fixture(params=["as_subuid_user", "as_plain_user"])
def user(request):
    found = request.getfixturevalue(request.param)
    found.write("part", "A\n")
    found.write("sub/b.txt", "B\n")
    found.write("sub/skip.log", "log\n")
    found.write(".dockerignore", "*.sif\ncache\n**/*.log\n")
    found.environ["SINGULARITY_NO_HTTPS"] = "1"
    return found


def build(user, text: str, *words: str, name: str = "Dockerfile", fails: bool = False):
    user.write(name, text)
    result = user(["singularity", "build", "-F", *words, "x.sif", name])
    assert (result.returncode != 0) is fails, result.stderr
    return result


def statuses(user, *words: str) -> list[tuple[str, str]]:
    result = user(["singularity", "build", "--json", "-F", *words, "x.sif", "Dockerfile"])
    assert result.returncode == 0, result.stderr
    found = [json.loads(line) for line in result.stdout.splitlines()]
    titles = {event["step"]: event["title"] for event in found if event["event"] == "start"}
    return [(titles[event["step"]], event["status"]) for event in found if event["event"] == "end"]


def inside(user, *words: str) -> str:
    return user(["singularity", "exec", "x.sif", *words], check=True).stdout


def part(user, name: str) -> bytes:
    """Return an object of the SIF file by its name; the last without one is the file system."""
    objects = json.loads(user(["singularity", "sif", "list", "--json", "x.sif"], check=True).stdout)["objects"]
    number = [str(one["id"]) for one in objects if one["name"] == name][-1]
    return user(["singularity", "sif", "dump", number, "x.sif"], check=True, text=False).stdout


def listing(user, tool) -> dict[str, str]:
    """Return path → mode and owner, as unsquashfs says."""
    program = tool("unsquashfs")
    path = user.write("fs.squashfs", part(user, ""))
    out = subprocess.run([program, "-lln", "-d", "", str(path)], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 5) for line in out.splitlines() if line[:1] in "-dlcbps"]
    return {line[5].split(" -> ")[0]: f"{line[0]} {line[1]}" for line in lines if len(line) == 6}


WHOLE = """\
# syntax=docker/dockerfile:1
ARG BASE
FROM $BASE AS build
ARG WHO=world
ENV GREETING="hello $WHO"
COPY part sub/ ./
RUN echo "$GREETING $FROM_BASE" > out && chown 5:6 out && ln out hard && chmod 4755 part
FROM build AS unused
RUN exit 1
FROM ${BASE}
LABEL mine="two words"
COPY --from=build /opt /copied
COPY --chown=app:extra --chmod=600 part /home/app/
COPY <<E1 <<"E2" /docs/
base: $FROM_BASE 'q' \\d
E1
raw: $FROM_BASE
E2
RUN mkdir -p /home/app && chown app /home/app
USER app
WORKDIR /home/app/work
WORKDIR ..
RUN id -u > mine; id -G >> mine; echo $HOME >> mine
ENV A=b PATH=/own:$PATH
EXPOSE 80
ENTRYPOINT ["/bin/cat"]
CMD ["/docs/E1"]
"""


def test_stages_users_owners_and_configuration(user, image, tool):
    result = build(user, WHOLE, "--build-arg", f"BASE={image}", "--build-arg", "WHO=you")
    assert "unused" not in result.stderr
    assert inside(user, "cat", "/copied/out", "/home/app/mine") == "hello you yes\n1000\n1000 50\n/home/app\n"
    assert inside(user, "cat", "/docs/E1", "/docs/E2") == "base: yes 'q' \\d\nraw: $FROM_BASE\n"
    assert user(["singularity", "run", "x.sif"], check=True).stdout == "base: yes 'q' \\d\n"
    assert inside(user, "/bin/sh", "-c", "echo $A $PATH").startswith("b /own:/usr/local/bin")
    files = listing(user, tool)
    assert files["/copied/out"] == files["/copied/hard"] == "-rw-r--r-- 5/6"
    assert files["/copied/part"] == "-rwsr-xr-x 0/0"
    assert files["/home/app/part"] == "-rw------- 1000/50"
    assert files["/home/app/mine"] == "-rw-r--r-- 1000/1000"
    assert files["/home/app/work"] == "drwxr-xr-x 1000/1000"
    assert "/copied/skip.log" not in files and "/copied/b.txt" in files
    labels = user(["singularity", "inspect", "x.sif"], check=True).stdout
    assert "mine: two words" in labels and "base: 1" in labels
    assert user(["singularity", "inspect", "--deffile", "x.sif"], check=True).stdout.startswith("# syntax=")
    config = json.loads(part(user, "oci-config.json"))["config"]
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == ("app", "/home/app", ["/docs/E1"])
    assert config["ExposedPorts"] == {"80/tcp": {}} and "FROM_BASE=yes" in config["Env"]


CACHED = """\
FROM {image} AS one
COPY part /part
RUN dd if=/dev/urandom of=/random bs=1k count=64
FROM {image}
RUN echo first > /first
COPY --from=one /random /random
COPY sub /sub
LABEL note={label}
RUN echo {last} > /last
"""


DD = "RUN dd if=/dev/urandom of=/random bs=1k count=64"


def test_only_what_changed_runs_again(user, image):
    def words(label="1", last="x") -> dict[str, str]:
        user.write("Dockerfile", CACHED.format(image=image, label=label, last=last))
        return {title.split("] ")[-1].split(" /")[0]: status for title, status in statuses(user)}

    assert set(words().values()) == {"done"}
    random = inside(user, "cat", "/last")
    again = words(label="2")  # a label makes nothing run again
    assert {status for title, status in again.items() if title.startswith(("RUN", "COPY", "FROM"))} == {"cached"}
    changed = words(label="2", last="y")
    assert changed["RUN echo first >"] == "cached" and changed["RUN echo y >"] == "done"
    assert changed[DD] == "cached"
    assert inside(user, "cat", "/last") == "y\n" != random
    user.write("sub/skip.log", "other\n")  # nobody sees it
    assert words(label="2", last="y")["RUN echo y >"] == "cached"
    user.write("sub/b.txt", "other\n")
    changed = words(label="2", last="y")
    assert changed["RUN echo first >"] == "cached" and changed["COPY sub"] == "done"
    assert inside(user, "cat", "/sub/b.txt") == "other\n"
    user.write("part", "other\n")
    assert {status for title, status in words(label="2", last="y").items() if "dd" in title} == {"done"}


def test_plan_tells_what_is_cached_and_no_cache_runs_everything(user, image):
    text = f"FROM {image}\nRUN echo a > /a\nRUN echo b > /b\n"
    build(user, text)
    lines = user(["singularity", "build", "--plan", "x.sif", "Dockerfile"], check=True).stdout.splitlines()
    assert ["cached" in line for line in lines] == [True, True, True, False, False]
    assert {status for _, status in statuses(user, "--no-cache")} == {"done"}


MOUNTS = """\
FROM {image}
RUN --mount=type=cache,target=/cache echo x >> /cache/n
RUN --mount=type=cache,target=/cache --mount=type=tmpfs,target=/memory cat /cache/n > /seen; touch /memory/a
RUN --mount=type=secret,id=token --mount=type=secret,id=var,env=VAR x=$(cat /run/secrets/token) && \\
    [ ${{#x}} = 6 ] && [ "$VAR" = hidden ]
RUN --mount=type=bind,target=/ctx --mount=type=bind,from={image},source=/etc,target=/other,rw \\
    cat /ctx/part > /bound && [ ! -e /ctx/sub/skip.log ] && touch /other/x && ! touch /ctx/y
WORKDIR /work
RUN --mount=type=bind [ "$(cat part)" = A ] && ! touch here
RUN --network=none true
"""


def test_mounts_leave_nothing_and_secrets_are_in_no_file(user, image):
    user.write("token", "s3cr3t")
    words = ("--secret", "id=token,src=token", "--secret", "id=var,env=HIDDEN")
    user.environ["HIDDEN"] = "hidden"
    build(user, MOUNTS.format(image=image), *words)
    assert inside(user, "cat", "/seen", "/bound") == "x\nA\n"
    found = inside(user, "/bin/sh", "-c", "ls -d /cache /memory /run/secrets /ctx /other /work/* 2>/dev/null; true")
    assert found == ""
    result = user(["grep", "-rl", "-e", "s3cr3t", str(user.tmp / "cache"), str(user.tmp / "x.sif")])
    assert result.stdout == ""
    assert user(["grep", "-c", "s3cr3t", "token"]).stdout == "1\n"
    listed = json.loads(user(["singularity", "cache", "list", "--json", "--type", "mount"], check=True).stdout)
    assert len(listed["entries"]) == 1
    # The same secret is not asked for again, and another one changes no step.
    assert {status for title, status in statuses(user) if "RUN" in title} == {"cached"}


def test_caches_of_mounts_can_be_cleaned(user, image):
    build(user, f"FROM {image}\nRUN --mount=type=cache,target=/c mkdir /c/d && echo x > /c/d/x && chown -R 5:6 /c/d\n")
    user(["singularity", "cache", "clean", "--force", "--type", "mount"], check=True)
    assert not [path for path in (user.tmp / "cache/cache/mounts").iterdir() if path.suffix != ".lock"]


def test_triggers_of_the_base_are_followed_and_count_for_the_cache(user, registry):
    text = f"FROM {registry.host}/a/b:onbuild\nRUN cat /from-trigger > /got && [ -e /ran ]\n"
    build(user, text)
    assert inside(user, "cat", "/got") == "A\n"
    user.write("part", "changed\n")
    build(user, text)
    assert inside(user, "cat", "/got") == "changed\n"
    build(user, f"FROM {registry.host}/a/b:onbuild\nENV X=1\n")
    assert inside(user, "cat", "/from-trigger") == "changed\n"


def test_add_unpacks_archives_and_copy_does_not(user, image, tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:xz") as tar:
        info = tarfile.TarInfo("inner/file")
        info.size, info.uid, info.gid, info.mode = 2, 7, 8, 0o2755
        tar.addfile(info, io.BytesIO(b"hi"))
    user.write("t.tar.xz", out.getvalue())
    user.write("plain.gz", gzip.compress(b"not a tar" * 100))
    build(user, f"FROM {image}\nADD t.tar.xz plain.gz /a/\nCOPY t.tar.xz /c/\n")
    assert inside(user, "ls", "/a", "/a/inner", "/c").split() == [
        "/a:",
        "inner",
        "plain.gz",
        "/a/inner:",
        "file",
        "/c:",
        "t.tar.xz",
    ]


def test_add_fetches_and_checks(user, image):
    data = b"fetched" * 1000
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(user.tmp))
    user.write("served.bin", data)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}/served.bin"
        right = hashlib.sha256(data).hexdigest()
        user.environ["no_proxy"] = "127.0.0.1"
        build(user, f"FROM {image}\nADD --checksum=sha256:{right} --chmod=644 {address} /a/\nADD {address} /b\n")
        assert inside(user, "stat", "-c", "%a %s", "/a/served.bin", "/b") == "644 7000\n600 7000\n"
        wrong = build(user, f"FROM {image}\nADD --checksum=sha256:{'0' * 64} {address} /a/\n", fails=True)
        assert "Dockerfile:2" in wrong.stderr and "refused" in wrong.stderr
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_image_without_steps_takes_over_the_blocks_of_its_base(user, image):
    result = build(user, f'FROM {image}\nENV MORE=1\nCMD ["/bin/cat", "/etc/group"]\n')
    assert "FROM" not in result.stderr
    assert "extra" in user(["singularity", "run", "x.sif"], check=True).stdout


def test_scratch_and_folder_as_a_spec(user):
    user.write("project/Dockerfile", "FROM scratch\nCOPY data /data\n")
    user.write("project/data", "x")
    user(["singularity", "build", "-F", "x.sif", "project"], check=True)
    user(["singularity", "build", "-F", "--sandbox", "box", "project"], check=True)
    assert (user.tmp / "box/data").read_text() == "x"


def test_target_builds_a_stage(user, image):
    build(user, f"FROM {image} AS a\nRUN echo a > /a\nFROM {image} AS b\nRUN exit 1\n", "--target", "a")
    assert inside(user, "cat", "/a") == "a\n"
    result = build(user, f"FROM {image} AS a\n", "--target", "c", fails=True)
    assert "its stages: a" in result.stderr


@pytest.mark.parametrize(
    ("lines", "place", "words"),
    [
        ("RUN echo said; exit 7", 2, "RUN ended with status 7"),
        ("COPY nosuch /x", 2, "there is no nosuch in the context"),
        ("COPY prt /x", 2, "did you mean part?"),
        ("COPY sub/skip.log /x", 2, ".dockerignore leaves it out"),
        ("COPY /etc/passwd /x", 2, "nothing outside of it can be copied"),
        ("COPY part sub /x", 2, "end it with a slash: /x/"),
        ("COPY --from=5 /x /x", 2, "no stage of this number"),
        ("USER nobody-here\nRUN true", 3, "the image has no user nobody-here"),
        ("RUN --mount=type=ssh true", 2, "no agent is passed"),
        ("RUN --mount=type=secret,id=x,required true", 2, "--secret id=x,src=FILE"),
        ("ENV A", 2, "write A=VALUE"),
        ("RUN --security=insecure true", 2, "cannot be had"),
        ("EXPOSE eighty", 2, "no port"),
        ("COPY part /etc/passwd/x", 2, "is a file, not a folder"),
    ],
)
def test_failures_name_the_line_and_write_nothing(as_subuid_user, image, lines, place, words):
    user = as_subuid_user
    user.environ["SINGULARITY_NO_HTTPS"] = "1"
    user.write("part", "A\n")
    user.write("sub/skip.log", "log\n")
    user.write(".dockerignore", "**/*.log\n")
    result = build(user, f"FROM {image}\n{lines}\n", fails=True)
    assert result.returncode == 255
    assert f"Dockerfile:{place}" in result.stderr and words in result.stderr
    assert not (user.tmp / "x.sif").exists()


def test_context_cannot_be_left(user, image):
    (user.tmp / "link").symlink_to("/etc/hostname")
    user.write("tree/real", "x")
    (user.tmp / "tree/link").symlink_to("/etc/hostname")
    result = build(user, f"FROM {image}\nCOPY link /x\n", fails=True)
    assert "there is no link in the context" in result.stderr
    build(user, f"FROM {image}\nCOPY tree /tree\nCOPY ../../part /up\n")
    assert inside(user, "/bin/sh", "-c", "[ -L /tree/link ] && cat /up") == "A\n"


def test_unused_arguments_and_wrong_options_are_told(user, image):
    assert "are not used" in build(user, f"FROM {image}\n", "--build-arg", "NO=1").stderr
    assert "are for definition files" in build(user, f"FROM {image}\n", "--section", "post", fails=True).stderr
    user.write("x.def", "Bootstrap: scratch\n")
    result = user(["singularity", "build", "--target", "a", "y.sif", "x.def"])
    assert result.returncode == 255 and "is for Dockerfiles" in result.stderr


JUDGED = """\
ARG BASE
FROM ${BASE} AS build
ARG WHO=world
ENV GREETING="hello $WHO"
WORKDIR /src
COPY part sub/ ./
COPY sub /dirs/sub
COPY su* pa?t /globs/
RUN echo "$GREETING $WHO" > out && chown 1000:50 out && ln out hard && chmod 4755 part
ONBUILD RUN touch /trigger
FROM build AS two
RUN ls /trigger && mkdir /empty && chmod 700 /empty
FROM ${BASE}
LABEL one="two three"
COPY --from=two / /all/
COPY --from=build /src /opt/src/
COPY --chown=app:extra part /home/app/
COPY --chown=1000 sub /home/app/sub
COPY part /home/app/x/y/
ADD t.tar.gz /unpacked/
ADD part /added
USER app
WORKDIR /home/app/w
ENV A=b C="d e" PATH=/x:$PATH
EXPOSE 80 443/udp
VOLUME /data /more
STOPSIGNAL SIGINT
ENTRYPOINT ["/bin/echo", "ep"]
CMD default words
"""
#: What buildah or we put into every image by ourselves, and what machines differ in.
_NOISE = (".singularity.d", ".exec", ".run", ".shell", ".test", "environment", "singularity", "etc/hostname", "run")


def contents(path) -> tuple[dict[str, tuple], dict]:
    """Return everything in an image, and its OCI configuration."""
    from pysingularity.image import metadata
    from pysingularity.image.inside import squashfs_of
    from pysingularity.image.open import open_image

    found = {}
    with open_image(str(path)) as image:
        config = json.loads(metadata.oci_config_of(image) or b"{}")["config"]
        files = squashfs_of(image)
        for name, inode in files.walk():
            short = name.decode().removeprefix("all/")
            if not any(short == one or short.startswith(f"{one}/") for one in _NOISE):
                content = files.read(inode) if inode.kind == "file" else inode.target
                links = inode.nlink if inode.kind == "file" else 0
                found[name.decode()] = inode.kind, oct(inode.mode), inode.uid, inode.gid, content, links
    return found, config


@pytest.mark.long
@pytest.mark.peer
def test_buildah_makes_the_same_of_the_same_dockerfile(user, layer, tool, root_only, tmp_path):
    buildah = [tool("buildah"), "--storage-driver", "vfs", "--root", tmp_path / "st", "--runroot", tmp_path / "rr"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        info = tarfile.TarInfo("inner/file")
        info.size, info.uid, info.gid, info.mode = 2, 7, 8, 0o640
        tar.addfile(info, io.BytesIO(b"hi"))
    user.write("t.tar.gz", out.getvalue())
    user.write("Dockerfile", JUDGED)
    user.write("base.docker", "FROM scratch\nADD root.tar.gz /\n")
    user.write("root.tar.gz", layer)
    user(["singularity", "build", "base.sif", "base.docker"], check=True)
    user(["singularity", "convert", "--to", "oci-archive", "base.sif", "base.tar"], check=True)
    base = f"oci-archive:{user.tmp}/base.tar"
    words = ["bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--build-arg", f"BASE={base}"]
    judged = subprocess.run([*buildah, *words, "-t", "out:1", user.tmp], capture_output=True, text=True)
    if judged.returncode:
        pytest.skip(f"buildah does not work here: {judged.stderr.strip().splitlines()[-1]}")
    subprocess.run([*buildah, "push", "-q", "out:1", f"oci-archive:{user.tmp}/judge.tar"], check=True)
    user.own(user.tmp / "judge.tar")
    user(["singularity", "build", "judge.sif", "oci-archive:judge.tar"], check=True)
    build(user, JUDGED, "--build-arg", f"BASE={base}")
    theirs, their_config = contents(user.tmp / "judge.sif")
    ours, our_config = contents(user.tmp / "x.sif")
    assert {name: (ours.get(name), one) for name, one in theirs.items() if ours.get(name) != one} == {}
    assert set(ours) == set(theirs)
    for config in (their_config, our_config):
        config["Env"] = sorted(config["Env"])
        config["Labels"] = {"one": config["Labels"]["one"]}
    assert our_config == their_config
