# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from pysingularity.build.deb.control import Relation, paragraph, paragraphs, relations
from pysingularity.build.deb.packages import Archive, PackageIndex
from pysingularity.build.deb.solver import Solver
from pysingularity.errors import UserError

HERE = Archive("file:///m", "toy", "the index")


def index(*texts: str, arch: str = "amd64") -> PackageIndex:
    """Make an index of one-line packages: "name version; Field: value; …"."""
    blocks = []
    for text in texts:
        head, *fields = text.split("; ")
        name, _, version = head.partition(" ")
        lines = [f"Package: {name}", f"Version: {version or '1'}", "Architecture: all", *fields]
        blocks.append("\n".join(lines))
    made = PackageIndex(arch)
    made.add(("\n\n".join(blocks) + "\n").encode(), HERE)
    return made


def names(found: PackageIndex, *wanted: str, **options) -> list[str]:
    return sorted(package.name for package in Solver(found, **options).solve([Relation(name) for name in wanted]))


def test_dependencies_are_followed_to_the_end() -> None:
    found = index("a; Depends: b, c (>= 2)", "b; Pre-Depends: d", "c 2", "d", "e")
    assert names(found, "a") == ["a", "b", "c", "d"]


def test_circles_end() -> None:
    assert names(index("a; Depends: b", "b; Depends: a"), "a") == ["a", "b"]


def test_the_first_possible_alternative_is_taken() -> None:
    assert names(index("a; Depends: gone | b | c", "b", "c"), "a") == ["a", "b"]


def test_an_alternative_that_is_wanted_anyway_answers() -> None:
    assert names(index("a; Depends: b | c", "b", "c"), "a", "c") == ["a", "c"]


def test_an_alternative_whose_needs_do_not_fit_is_taken_back() -> None:
    found = index("a; Depends: b | c, x", "b; Depends: y", "c", "x", "y; Conflicts: x")
    assert names(found, "a") == ["a", "c", "x"]


def test_avoided_packages_are_taken_only_when_nothing_else_helps() -> None:
    assert names(index("a; Depends: b | c", "b", "c"), "a", avoid=frozenset("b")) == ["a", "c"]
    assert names(index("a; Depends: b", "b"), "a", avoid=frozenset("b")) == ["a", "b"]


def test_a_provided_name_answers_and_the_important_provider_comes_first() -> None:
    found = index("a; Depends: mta", "p1; Provides: mta; Priority: extra", "p2; Provides: mta; Priority: important")
    assert names(found, "a") == ["a", "p2"]


def test_versions_of_provided_names_count() -> None:
    found = index("a; Depends: v (>= 2)", "p1; Provides: v", "p2; Provides: v (= 1)", "p3; Provides: v (= 3)")
    assert names(found, "a") == ["a", "p3"]


def test_an_older_version_answers_when_the_newest_does_not_fit() -> None:
    found = Solver(index("a; Depends: b (<< 2)", "b 1", "b 2")).solve([Relation("a")])
    assert [package.version for package in found] == ["1", "1"]


def test_the_newest_version_of_all_sources_is_chosen() -> None:
    found = index("a 1")
    found.add(b"Package: a\nVersion: 2\nArchitecture: all\n", HERE._replace(suite="toy-security"))
    assert Solver(found).solve([Relation("a")])[0].archive.suite == "toy-security"


def test_architecture_qualifiers() -> None:
    found = index(
        "a; Depends: b:any, c:amd64", "b; Multi-Arch: allowed", "c", "d; Depends: c:any", "e; Depends: c:i386"
    )
    assert names(found, "a") == ["a", "b", "c"]
    for name in ("d", "e"):
        with pytest.raises(UserError, match="which no source offers"):
            names(found, name)


def test_packages_of_other_architectures_are_not_seen() -> None:
    found = PackageIndex("amd64")
    found.add(b"Package: a\nVersion: 1\nArchitecture: arm64\n", HERE)
    with pytest.raises(UserError) as caught:
        names(found, "a")
    assert caught.value.id == "no-such-package"


def test_a_missing_package_gets_a_suggestion() -> None:
    with pytest.raises(UserError) as caught:
        names(index("cmake"), "cmkae")
    assert "cmake" in caught.value.hint


def test_a_missing_dependency_names_who_needs_it() -> None:
    with pytest.raises(UserError, match=r"a 1 needs b \(>= 2\), which no source offers \(b is 1 there\)"):
        names(index("a; Depends: b (>= 2)", "b 1"), "a")


@pytest.mark.parametrize("field", ["Conflicts", "Breaks"])
@pytest.mark.parametrize("turn", [False, True])
def test_what_conflicts_cannot_be_wanted_together(field: str, turn: bool) -> None:
    found = index(f"a; {field}: b (<< 2)", "b 1")
    with pytest.raises(UserError) as caught:
        names(found, *(["b", "a"] if turn else ["a", "b"]))
    assert caught.value.id == "unsatisfiable"


def test_conflicts_with_a_name_one_provides_oneself_do_not_count() -> None:
    found = index("a; Provides: mta; Conflicts: mta", "b; Provides: mta; Conflicts: mta")
    assert names(found, "a") == ["a"]
    with pytest.raises(UserError, match="conflicts with"):
        names(found, "a", "b")


def test_essential_and_required_packages_are_the_base_wherever_the_field_stands() -> None:
    found = PackageIndex("amd64")
    found.add(
        b"Essential: yes\nPackage: a\nVersion: 1\nArchitecture: all\n\n"
        b"Package: b\nPriority: required\nVersion: 1\nArchitecture: amd64\n\n"
        b"Package: c\nPriority: important\nVersion: 1\nArchitecture: all\n\n"
        b"Provides: v, w (= 2)\nPackage: d\nVersion: 1\nArchitecture: all\n",
        HERE,
    )
    assert found.base() == ["a", "b"]
    assert [package.name for package, _ in found.providers("w")] == ["d"]


@pytest.mark.parametrize(
    "filename", ["/etc/passwd", "../x.deb", "pool/../../x.deb", "pool//x.deb", "", "pool/x\x1b.deb", "pool\\x"]
)
def test_paths_that_leave_the_mirror_are_refused(filename: str) -> None:
    package = index(f"a; Filename: {filename}").candidates("a")[0]
    with pytest.raises(UserError, match="refused"):
        _ = package.filename


@pytest.mark.parametrize("size", ["", "-1", "0", "1e9", "99999999999999999"])
def test_impossible_sizes_are_refused(size: str) -> None:
    with pytest.raises(UserError, match="impossible size"):
        _ = index(f"a; Size: {size}").candidates("a")[0].size


def test_a_package_without_a_strong_checksum_is_refused() -> None:
    with pytest.raises(UserError, match="no SHA256"):
        _ = index("a; MD5sum: 0cc175b9c0f1b6a831c399e269772661").candidates("a")[0].sha256


def test_a_damaged_paragraph_names_the_package() -> None:
    with pytest.raises(UserError, match="package a: no relation"):
        index("a; Depends: (>= 1)").candidates("a")


def test_relations_and_paragraphs_are_read_as_policy_writes_them() -> None:
    assert relations("a (>= 1:2~), b:any|c [amd64] <!nocheck>,") == (
        (Relation("a", "", ">=", "1:2~"),),
        (Relation("b", "any"), Relation("c")),
    )
    assert paragraph("A: 1\nB:\n x\n .\n# no\nC: 2")["B"] == "\nx\n."
    assert [len(fields) for fields in paragraphs("\n\nA: 1\n\n\nB: 2\nC: 3\n")] == [1, 2]
    with pytest.raises(UserError, match="no field"):
        paragraph("nonsense")
