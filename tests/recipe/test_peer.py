# SPDX-License-Identifier: Apache-2.0
"""The real Apptainer judges which definition files are accepted, and what it makes of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from pysingularity.errors import RecipeError
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import check, labels

pytestmark = pytest.mark.peer

ACCEPTED = {
    "comments": "# c\nBootStrap: scratch # why\n\n# d\nStage : one\n%help\nhello\n%labels\n  A b c\n\n# x\n",
    "crlf": "Bootstrap: scratch\r\n%help\r\nhello\r\n",
    "continued": "Bootstrap: scratch\nFrom: a \\\n b \\n\\\n c\n%help\nx\n",
    "repeated": "Bootstrap: scratch\n%help\na\n%labels\nX 1\n%help\nb\n%labels\nX 2\n",
    "capitals": "BOOTSTRAP: scratch\n%HELP\na\n%%labels\nX 1\n",
    "templates": "Bootstrap: {{ B }}\n%arguments\nB=scratch\nV={{ W }}-1\nW=w\n%help\n{{ V }} # {{ NO }}\n"
    "%labels\nV {{V}}\n",
    "open-end": "Bootstrap: scratch\n%labels\nA b\n%help\nx",
    "odd-files": "Bootstrap: scratch\n%files foo\n%help\nx\n%files from\n%labels\nA b\n",
    "words": "Bootstrap: scratch\n%help  two words\na %help b\n100%\n%labels\nKEY\nA=b c\n# c\nB d # e\n",
    "header": "\n# c\nBootstrap: scratch#x\nFrom: a\nFrom: b\nOtherURL1: c\nInclude:\n%help\nx\n%labels\nA b\n",
    "defaults": "Bootstrap: scratch\n%arguments x\nA=\nB=1\n%help\n[{{A}}] {{  B}} {{ .C }} {{}}\n%labels\nA b\n",
    "carriage": "Bootstrap: scratch\r\nFrom: a \\\r\n b\r\n%help\r\nx\r\n%labels\r\nA b\r\n",
}
REFUSED = {
    "section": "Bootstrap: scratch\n%label\nA b\n",
    "lone": "Bootstrap: scratch\n%help\nx\n%\n",
    "blank": "Bootstrap: scratch\n% help\nx\n",
    "keyword": "Bootstrap: scratch\nForm: x\n",
    "colon": "Bootstrap: scratch\nDistType debian\n",
    "template": "Bootstrap: scratch\n%help\n{{ X }}\n",
    "no-header": "%help\nx\n",
    "from-first": "From: x\nBootstrap: scratch\n%help\nx\n",
    "comment-only": "# nothing\n",
    "app-name": "Bootstrap: scratch\n%apprun\nx\n",
    "colon-name": "Bootstrap: scratch\n%help:\nx\n",
    "stage": "Bootstrap: scratch\n%files from nope\n/x\n",
    "bare-number": "Bootstrap: scratch\nOtherURL: b\n%help\nx\n",
    "second-stage": "Bootstrap: scratch\n%arguments\nA=1\n%help\n{{A}}\nBootstrap: scratch\n%help\n{{A}}\n",
}


@pytest.fixture
def judge(apptainer):
    folder = Path(tempfile.mkdtemp(prefix="pysingularity-judge-", dir="/tmp"))

    def build(text: str) -> Path | None:
        (folder / "x.def").write_bytes(text.encode())
        shutil.rmtree(folder / "box", ignore_errors=True)
        result = apptainer("-s", "build", "--sandbox", folder / "box", folder / "x.def")
        return None if result.returncode else folder / "box"

    yield build
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ACCEPTED)
def test_peer_finds_the_same_header_labels_and_help(judge, name):
    text = ACCEPTED[name]
    box = judge(text)
    assert box is not None
    recipe = parse(text.encode(), "x.def", {})
    check(recipe)
    (stage,) = recipe.stages
    found = json.loads((box / ".singularity.d/labels.json").read_text())
    prefix = "org.label-schema.usage.singularity.deffile."
    assert {key[len(prefix) :]: value for key, value in found.items() if key.startswith(prefix)} == stage.header
    assert {key: value for key, value in found.items() if "label-schema" not in key} == labels(stage.body("labels"))
    assert (box / ".singularity.d/runscript.help").read_text().rstrip("\n") == stage.body("help").rstrip("\n")
    # The peer stores the text of the last stage alone, we the whole file.
    stored = (box / ".singularity.d/Singularity").read_text()
    assert recipe.text.replace("\r\n", "\n").rstrip("\n").endswith(stored.rstrip("\n"))


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_peer_refuses_is_refused_with_a_place(judge, name):
    assert judge(REFUSED[name]) is None
    with pytest.raises(RecipeError) as caught:
        check(parse(REFUSED[name], "x.def", {}))
    assert str(caught.value).startswith("x.def:")
