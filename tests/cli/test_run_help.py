# SPDX-License-Identifier: Apache-2.0
"""`singularity run-help` shows help texts and says when there is none."""

from __future__ import annotations

import pytest

from pysingularity.cli.main import main
from pysingularity.image import metadata, scif
from pysingularity.image.entries import Entry, put_into_folder


@pytest.fixture
def box(tmp_path):
    entries = [Entry.file(metadata.HELP, "  help me\n  twice\n"), *scif.entries("foo", help="foo!")]
    put_into_folder(str(tmp_path), entries)
    return str(tmp_path)


def test_help_of_the_image_and_of_an_app(box, capfd):
    assert main(["run-help", box]) == 0
    assert main(["run-help", "--app", "foo", box]) == 0
    assert capfd.readouterr().out == "  help me\n  twice\nfoo!\n"


@pytest.mark.parametrize("words", [[], ["--app", "nosuch"]])
def test_no_help_is_no_failure(tmp_path, capfd, words):
    assert main(["run-help", *words, str(tmp_path)]) == 0
    assert capfd.readouterr().out == "No help sections were defined for this image\n"
