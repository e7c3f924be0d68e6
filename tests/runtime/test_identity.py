# SPDX-License-Identifier: Apache-2.0
"""The passwd and group files of a container."""

from __future__ import annotations

from pysingularity.runtime.identity import User, group, passwd

ME = User("me", 1000, 1000, "/home/me", "/bin/zsh", "Me Myself", [1000, 44])
IMAGE = b"root:x:0:0:root:/root:/bin/bash\nme:x:500:500::/old:/bin/sh\nother:x:1000:1:o:/o:/bin/sh\n+::::::\n"


def test_caller_gets_one_line_with_the_containers_home():
    lines = passwd(IMAGE, ME, "/h").decode().splitlines()
    assert lines.count("me:x:1000:1000:Me Myself:/h:/bin/zsh") == 1
    assert [line for line in lines if line.startswith("me:") or line.split(":")[2] == "1000"] == [
        "me:x:1000:1000:Me Myself:/h:/bin/zsh"
    ]
    assert "root:x:0:0:root:/root:/bin/bash" in lines


def test_emulated_root_keeps_the_images_root_with_its_home():
    assert "root:x:0:0:root:/h:/bin/bash" in passwd(IMAGE, ME, "/h", uid=0).decode().splitlines()


def test_image_without_passwd_gets_one():
    assert passwd(b"", ME, "/h") == b"me:x:1000:1000:Me Myself:/h:/bin/zsh\n"


def test_groups_of_the_caller_are_added_once():
    lines = group(b"root:x:0:\nusers:x:1000:\n", ME).decode().splitlines()
    assert [line.split(":")[2] for line in lines] == ["0", "1000", "44"]
    assert lines[1] == "users:x:1000:"


def test_bytes_that_are_no_text_pass_through():
    assert b"\xff\xfe:x:5:5::/:/bin/sh\n" in passwd(b"\xff\xfe:x:5:5::/:/bin/sh\n", ME, "/h")
