# SPDX-License-Identifier: Apache-2.0
"""Merging layers: the OCI rules, hostile layers, and data that is never stored in vain."""

from __future__ import annotations

import io
import tarfile

import pytest

from pysingularity.errors import ImageError
from pysingularity.registry.inflate import Inflate
from pysingularity.registry.layers import Merge, merge_layers
from pysingularity.registry.tar import TarReader
from registries import tar_of

LINK, HARD, CHAR = {"type": tarfile.SYMTYPE}, {"type": tarfile.LNKTYPE}, {"type": tarfile.CHRTYPE}


class Store:
    """Keeps contents as they are."""

    def __init__(self):
        self.kept = []

    def store_bytes(self, data):
        self.kept.append(data)
        return data

    def begin_stretch(self):
        return 0, 0

    def store(self, read, size):
        data = b""
        while len(data) < size:
            data += read(size - len(data))
        return self.store_bytes(data)


def merge(*layers):
    store = Store()
    archives = [tar_of(layer) for layer in layers]
    root, _ = merge_layers(
        lambda number: TarReader(Inflate(io.BytesIO(archives[number]).read, f"layer {number}")), len(layers), store
    )
    return root, store


def shown(root):
    return {path.decode(): node.data if node.kind == "file" else node.kind for path, node in root.walk() if path}


def test_upper_file_hides_the_lower_one_whose_data_is_not_stored():
    root, store = merge([("a", b"old"), ("b", b"stays")], [("a", b"new")])
    assert shown(root) == {"a": b"new", "b": b"stays"}
    assert b"old" not in store.kept


def test_whiteout_hides_files_of_lower_layers_only():
    root, store = merge(
        [("d", None), ("d/x", b"1"), ("d/y", b"2"), ("e", None), ("e/z", b"3")],
        [("d/x", b"fresh"), ("d/.wh.x", b""), ("d/.wh.y", b""), (".wh.e", b"")],
    )
    assert shown(root) == {"d": "dir", "d/x": b"fresh"}
    assert store.kept == [b"fresh"]


def test_opaque_folder_keeps_only_what_its_own_layer_puts_there():
    root, store = merge(
        [("d", None), ("d/x", b"1"), ("d/s", None), ("d/s/deep", b"2")],
        [("d", None), ("d/new", b"n"), ("d/.wh..wh..opq", b"")],
        [("d/top", b"t")],
    )
    assert shown(root) == {"d": "dir", "d/new": b"n", "d/top": b"t"}
    assert store.kept == [b"t", b"n"]


def test_folder_attributes_come_from_the_latest_layer_and_children_stay():
    root, _ = merge([("d", None), ("d/x", b"1")], [("d", {"type": tarfile.DIRTYPE, "mode": 0o700, "uid": 7})])
    node = root.find(b"d")
    assert (node.mode, node.uid, list(node.children)) == (0o700, 7, [b"x"])


def test_file_replaces_folder_and_folder_replaces_file():
    root, store = merge([("a", None), ("a/x", b"1"), ("b", b"file")], [("a", b"now"), ("b", None), ("b/y", b"2")])
    assert shown(root) == {"a": b"now", "b": "dir", "b/y": b"2"}
    assert b"1" not in store.kept


def test_hard_link_across_layers_is_one_node_and_survives_the_loss_of_its_first_name():
    root, _ = merge([("a", b"data")], [("b", {**HARD, "linkname": "a"})], [(".wh.a", b"")])
    assert shown(root) == {"b": b"data"}
    root, _ = merge([("a", b"data")], [("b", {**HARD, "linkname": "/a"})])
    assert root.find(b"a") is root.find(b"b")


def test_data_of_a_hidden_name_is_fetched_when_a_link_shows_it():
    root, store = merge([("a", b"x" * 200_000), ("b", {**HARD, "linkname": "a"})], [("a", b"new")])
    assert shown(root) == {"a": b"new", "b": b"x" * 200_000}
    assert len(store.kept) == 2


def test_parents_that_are_links_are_followed_inside_the_root_only():
    root, _ = merge(
        [
            ("usr", None),
            ("usr/lib", None),
            ("lib", {**LINK, "linkname": "usr/lib"}),
            ("up", {**LINK, "linkname": "../../etc"}),
        ],
        [("lib/x", b"1"), ("up/passwd", b"mine")],
    )
    assert shown(root) == {
        "usr": "dir", "usr/lib": "dir", "usr/lib/x": b"1", "lib": "symlink", "up": "symlink",
        "etc": "dir", "etc/passwd": b"mine",
    }  # fmt: skip


def test_data_behind_a_link_that_two_layers_name_is_not_lost():
    link = ("lib", {**LINK, "linkname": "usr"})
    root, _ = merge([("usr", None), dict_link(link), ("lib/x", b"1")], [dict_link(link)])
    assert shown(root)["usr/x"] == b"1"


def dict_link(entry):
    return entry[0], dict(entry[1])


@pytest.mark.parametrize(
    ("layer", "word"),
    [
        ([("../x", b"")], "climbs out"),
        ([("x", {**HARD, "linkname": "../../etc/passwd"})], "climbs out"),
        ([("x", {**HARD, "linkname": "/etc/shadow"})], "nothing in the image"),
        ([("d", None), ("x", {**HARD, "linkname": "d"})], "a folder"),
        ([("a", {**LINK, "linkname": "b"}), ("b", {**LINK, "linkname": "a"}), ("a/x", b"")], "too many symbolic links"),
        ([(".wh.", b"")], "whiteout of nothing"),
        ([("d/.wh...", b"")], "whiteout of nothing"),
        ([(".", {**LINK, "linkname": "x"})], "no folder"),
    ],
)
def test_hostile_layer_is_refused_in_one_line(layer, word):
    with pytest.raises(ImageError, match=word) as caught:
        merge(layer)
    assert "\n" not in caught.value.message


def test_number_of_entries_is_bounded(monkeypatch):
    monkeypatch.setenv("SINGULARITY_MAX_ENTRIES", "100")
    with pytest.raises(ImageError, match="more than 100 entries"):
        merge([(f"f{number}", b"") for number in range(60)], [(f"g{number}", b"") for number in range(60)])


def test_memory_of_many_tiny_entries_stays_small():
    import tracemalloc

    archive = tar_of([(f"d{number % 100}/file{number}", b"") for number in range(20_000)], form=tarfile.GNU_FORMAT)
    store = Store()
    store.kept = type("Nowhere", (), {"append": lambda self, data: None})()
    tracemalloc.start()
    work = Merge(store)
    work.scan(TarReader(Inflate(io.BytesIO(archive).read, "x")), 0)
    root = work.apply()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(1 for _ in root.walk()) == 20_101
    assert size / 20_000 < 1024
