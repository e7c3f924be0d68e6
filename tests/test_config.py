# SPDX-License-Identifier: Apache-2.0
"""Settings files: one table, later files win, mistakes are named with their line."""

from __future__ import annotations

import pytest

from pysingularity import config
from pysingularity.errors import UserError


def test_defaults_come_from_the_table(tmp_path):
    settings = config.load({"SINGULARITY_CONFIGDIR": str(tmp_path)}, "/nonexistent")
    assert settings["image driver"] == "auto"
    assert settings.number("sessiondir max size") > 0


def test_the_users_file_and_then_the_named_one_win(tmp_path):
    (tmp_path / "singularity.conf").write_text(
        "# mine\nimage driver = python\nsessiondir max size=16\nbind path = /a\n"
    )
    named = tmp_path / "named"
    named.write_text("image   driver = kernel\nbind path = /b\nbind path = /c:/d\nsome peer's key = yes\n")
    environ = {"SINGULARITY_CONFIGDIR": str(tmp_path), "SINGULARITY_CONFIG_FILE": str(named)}
    settings = config.load(environ, "/nonexistent")
    assert settings["image driver"] == "kernel"
    assert settings.number("sessiondir max size") == 16
    assert settings.many("bind path") == ["/b", "/c:/d"]


@pytest.mark.parametrize(
    "line", ["image driver = other", "mount home = maybe", "sessiondir max size = big", "mount dev = some"]
)
def test_mistakes_name_file_and_line(line):
    with pytest.raises(UserError, match=r"^f:2: "):
        config.parse(f"\n{line}\n", "f", {})


def test_missing_named_file_is_an_error(tmp_path):
    with pytest.raises(UserError):
        config.load({"SINGULARITY_CONFIG_FILE": str(tmp_path / "no")}, "/nonexistent")
