# SPDX-License-Identifier: Apache-2.0
"""The /.singularity.d contract: labels, apps, and what inspect reads of it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import ImageError, UserError
from pysingularity.image import metadata, scif
from pysingularity.image.entries import Entry, put_into_folder
from pysingularity.image.inside import FolderSource
from pysingularity.image.open import open_image
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create

texts = st.dictionaries(st.text(max_size=8), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))


@given(texts)
def test_labels_survive_their_file(labels):
    assert metadata.parse_labels(metadata.labels_file(labels)) == labels


@pytest.mark.parametrize("data", [None, b"", b"{", b"[]", b"null", b"\xff", b'{"a": ', b"[" * 100_000])
def test_unreadable_labels_are_none(data):
    assert metadata.parse_labels(data) == {}


def test_labels_that_are_no_text_are_shown_as_json():
    assert metadata.parse_labels(b'{"a": 1, "b": "x"}') == {"a": "1", "b": "x"}


def test_build_date_has_singularitys_spelling():
    assert metadata.build_date(1795532646) == "Tuesday_24_November_2026_15:4:6_UTC"


def test_automatic_labels_tell_the_definition_file():
    labels = metadata.automatic_labels(when=0, arch="arm64", header={"bootstrap": "docker", "from": "a"}, has_help=True)
    assert labels["org.label-schema.build-arch"] == "arm64"
    assert labels["org.label-schema.usage.singularity.deffile.from"] == "a"
    assert labels["org.label-schema.usage.singularity.runscript.help"] == "/.singularity.d/runscript.help"


def test_old_labels_win_unless_forced():
    old = {"A": "1", "B": "2", "org.label-schema.build-date": "long ago"}
    assert metadata.merge_labels(old, {"A": "9", "B": "2", "C": "3"}) == ({"A": "1", "B": "2", "C": "3"}, ["A"])
    assert metadata.merge_labels(old, {"A": "9"}, force=True) == ({"A": "9", "B": "2"}, [])


@pytest.fixture
def box(tmp_path):
    root = tmp_path / "box"
    root.mkdir()
    entries = [
        *metadata.base_entries(),
        Entry.file(metadata.LABELS, metadata.labels_file({"B": "2", "A": "1"})),
        Entry.file(metadata.HELP, "help me\n\n"),
        Entry.file(metadata.RUNSCRIPT, "#!/bin/sh\necho run\n", 0o755),
        Entry.file(metadata.TEST, "#!/bin/sh\ntrue\n", 0o755),
        Entry.file(metadata.DEFINITION, "bootstrap: scratch\n"),
        Entry.file(metadata.DOCKER_ENVIRONMENT, "export X=1\n", 0o755),
        *scif.entries("foo", run="echo foo", help="foo!", environment="export F=1", labels={"L": "x"}),
    ]
    put_into_folder(str(root), entries)
    return root


def test_collected_attributes_have_apptainers_shape_and_order(box):
    with FolderSource(str(box)) as source:
        found = metadata.collect(source)
    assert list(found) == ["apps", "environment", "labels", "runscript", "test", "helpfile", "deffile"]
    assert found["labels"] == {"A": "1", "B": "2"}
    assert list(found["environment"]) == [f"/{metadata.DOCKER_ENVIRONMENT}", f"/{metadata.CUSTOM_ENVIRONMENT}"]
    assert found["helpfile"] == "help me"
    app = found["apps"]["foo"]
    assert list(app) == ["environment", "labels", "runscript", "helpfile"]
    assert app["labels"] == {"L": "x", "SCIF_APP_NAME": "foo"}
    assert app["environment"] == {"/scif/apps/foo/scif/env/90-environment.sh": "export F=1"}
    json.loads(metadata.inspect_object(found))


def test_attributes_of_a_sif_are_those_of_its_object(tmp_path):
    path = tmp_path / "a.sif"
    stored = {"labels": {"A": "1", "bad": 3}, "runscript": "x", "test": ["no"], "apps": {"a": 1, "b": {"test": "t"}}}
    objects = [
        SifObject(layout.JSON, json.dumps(metadata.document(stored)).encode(), name=metadata.INSPECT_OBJECT),
        SifObject(layout.PARTITION, b"hsqs", extra=layout.partition_extra(1, 2, "amd64")),
    ]
    with open(path, "w+b") as file:
        create(file.fileno(), objects, identity=bytes(16))
    with open_image(str(path)) as image:
        found = metadata.attributes_of(image)
    assert found == {"apps": {"b": {"test": "t"}}, "labels": {"A": "1"}, "runscript": "x"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(metadata.ATTRIBUTES), inner, max_size=5)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(metadata.ATTRIBUTES), json_values))
def test_any_stored_attributes_are_cleaned(value):
    found = metadata.clean(value)
    assert set(found) <= set(metadata.ATTRIBUTES)
    assert metadata.clean(found) == found
    metadata.inspect_object(found)


def test_history_is_numbered(box):
    with FolderSource(str(box)) as source:
        folder, first = metadata.history_entry(source)
        assert first.path == ".singularity.d/bootstrap_history/Singularity0"
        put_into_folder(str(box), [folder, first])
        assert metadata.history_entry(source)[1].path.endswith("/Singularity1")


def test_oci_configuration_becomes_environment_and_runscript():
    config = {"config": {"Env": ["A=1"], "Cmd": ["sh"], "Labels": {"l": "v"}}}
    environment, runscript = metadata.oci_entries(config)
    assert b"A='1'" in environment.data
    assert b"exec 'sh'" in runscript.data
    assert metadata.oci_labels(config) == {"l": "v"}
    assert metadata.oci_labels({"config": None}) == {}


@pytest.mark.parametrize("inner", [{"Env": "A=1", "Cmd": 3}, {"Env": [1]}, {"Entrypoint": {"a": 1}}, []])
def test_strange_oci_configurations_are_refused(inner):
    if inner == []:
        assert metadata.oci_entries({"config": inner})
        return
    with pytest.raises(ImageError, match="configuration"):
        metadata.oci_entries({"config": inner})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb"])
def test_apps_have_names_that_can_be_folders(name):
    with pytest.raises(UserError, match="name of an app"):
        scif.entries(name)


def test_awkward_app_names_are_quoted():
    script = scif.global_script(["it's"]) + scif.install_script("it's", "true")
    assert "SCIF_APPROOT_it_s='/scif/apps/it'\\''s'" in script
