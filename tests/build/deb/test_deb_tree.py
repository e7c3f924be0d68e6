# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from pysingularity.build.deb import workers
from pysingularity.build.deb.database import Database, interests
from pysingularity.build.deb.tree import Tree
from pysingularity.build.deb.unpack import Opened
from pysingularity.errors import InternalError, UserError


def test_paths_stay_inside_whatever_links_say(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/abs").symlink_to("/etc")
    (tmp_path / "root/up").symlink_to("../../../../..")
    with Tree(str(tmp_path / "root")) as tree:
        with pytest.raises(OSError, match=r"File exists|No such file"):
            tree.write(b"abs/passwd", b"x")
        tree.write(b"up/etc/passwd", b"inside")
        tree.write(b"abs/passwd", b"over the link")
        assert tree.read(b"etc/passwd") == b"over the link"
        assert not tree.exists(b"etc/none")
        assert tree.is_folder(b"abs")
        assert not tree.is_folder(b"abs/passwd")
    assert (tmp_path / "root/etc/passwd").exists()


def test_reading_and_writing_never_follow_a_link_of_that_name(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/link").symlink_to(secret)
    with Tree(str(tmp_path / "root")) as tree:
        with pytest.raises(OSError, match="Too many levels"):
            tree.read(b"link")
        tree.write(b"link", b"new", 0o755)
        assert tree.exists(b"link")
    assert secret.read_text() == "s"
    assert (tmp_path / "root/link").stat().st_mode & 0o777 == 0o755


def test_workers_return_results_in_order_and_tell_progress() -> None:
    told: list[int] = []
    found = workers.run(
        lambda number: (number, b"x" * 100_000), 20, order=range(19, -1, -1), workers=3, done=told.append
    )
    assert [entry[0] for entry in found] == list(range(20))
    assert sorted(told) == list(range(20))
    assert workers.run(lambda _: 1, 0) == []


def test_an_error_of_a_worker_arrives_as_itself() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise UserError("the-id", "message", hint="try this")
        time.sleep(0.01)
        return number

    with pytest.raises(UserError) as caught:
        workers.run(work, 50, workers=2)
    assert (caught.value.id, caught.value.hint) == ("the-id", "try this")
    with pytest.raises(InternalError, match="ZeroDivisionError"):
        workers.run(lambda _: 1 // 0, 2)


def test_a_killed_worker_is_noticed() -> None:
    def work(number: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(InternalError, match="died"):
        workers.run(work, 4, workers=2)


def test_an_interrupt_leaves_no_children() -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())  # other tests of this process may have left it some
    with pytest.raises(KeyboardInterrupt):
        workers.run(lambda number: time.sleep(0.02 + 5 * (number > 0)), 3, workers=3, done=stop)
    assert set(children.read_text().split()) <= before


def opened(name: str, triggers: str = "", paths: tuple[bytes, ...] = ()) -> Opened:
    control = f"Package: {name}\nStatus: forged\nVersion: 1\nArchitecture: all\nDescription: d\n more\n"
    return Opened(name, control, list(paths), [], [b"/etc/c"], [], triggers, [])


def test_the_database_of_triggers_grows(tmp_path: Path) -> None:
    with Tree(str(tmp_path)) as tree:
        database = Database(tree)
        database.create()
        database.add([opened("libc-bin", "interest-await ldconfig # why\ninterest /usr/share/x/\n")])
        database.add([opened("b", "interest-noawait /usr/share/x\nactivate-noawait ldconfig\n")])
        assert tree.read(b"var/lib/dpkg/triggers/ldconfig") == b"libc-bin\n"
        assert tree.read(b"var/lib/dpkg/triggers/File") == b"/usr/share/x libc-bin\n/usr/share/x b/noawait\n"
        assert database.states() == {"libc-bin": "install ok unpacked", "b": "install ok unpacked"}
        database.activate([opened("c", paths=(b"/usr/share/xy",))], {"libc-bin"})
        assert tree.read(b"var/lib/dpkg/triggers/Unincorp") == b""
        database.activate([opened("c", paths=(b"/usr/share/x/new",))], {"libc-bin"})
        assert tree.read(b"var/lib/dpkg/triggers/Unincorp") == b"/usr/share/x -\n"
    assert interests("activate x\n\ninterest  y\n") == [("", "y")]


def test_diversions_are_read_by_owner(tmp_path: Path) -> None:
    with Tree(str(tmp_path)) as tree:
        tree.write(b"var/lib/dpkg/diversions", b"/bin/sh\n/bin/sh.distrib\ndash\n/a\n/b\n:\n")
        assert Database(tree).diversions() == {"dash": {b"/bin/sh": b"/bin/sh.distrib"}, ":": {b"/a": b"/b"}}
