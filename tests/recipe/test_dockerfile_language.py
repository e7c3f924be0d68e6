# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles as text: instructions, here-documents, variables, .dockerignore, and messages with their place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import RecipeError
from pysingularity.recipe.dockerfile import looks_like, parse
from pysingularity.recipe.dockerignore import Ignore
from pysingularity.recipe.dockerwords import Lexer, WordError, pairs, raw_words


def only(text: str):
    """Return the one instruction behind FROM."""
    return parse(f"FROM x\n{text}").stages[0].instructions[0]


def test_lines_continue_over_comments_and_empty_lines():
    one = only("RUN a && \\\n  # why\n\n    b \\\n  c\nCMD d")
    assert one.text == "a &&     b   c" and one.line == 2
    assert only("RUN a \\\\\nCMD b").text == "a \\\\"


def test_escape_directive_changes_the_sign():
    found = parse("# escape=`\nFROM x\nRUN dir C:\\\nCOPY a `\n  b\n")
    assert [one.text for one in found.stages[0].instructions] == ["dir C:\\", "a   b"]
    with pytest.raises(RecipeError, match="escape sign"):
        parse("# escape=x\nFROM x")


def test_directives_end_at_the_first_other_line():
    assert parse("# a comment\n# escape=`\nFROM x\nRUN a\\\nb").stages[0].instructions[0].text == "ab"


@pytest.mark.parametrize(
    ("name", "fine"),
    [("docker/dockerfile:1.7", True), ("docker.io/docker/dockerfile@sha256:1", True), ("r2d4/mockerfile", False)],
)
def test_only_the_language_dockerfile_is_read(name, fine):
    text = f"# syntax={name}\nFROM x"
    if fine:
        assert parse(text).stages
    else:
        with pytest.raises(RecipeError, match="another language"):
            parse(text)


def test_here_documents():
    one = only("RUN <<EOF cat <<-'B' 3<<C\n  x $y\nEOF\n\tq\n\tB\nC\n")
    assert [(doc.name, doc.content, doc.expand) for doc in one.heredocs] == [
        ("EOF", "  x $y\n", True),
        ("B", "q\n", False),
        ("C", "", True),
    ]
    assert only("RUN echo $((1<<2)) '<<EOF'").heredocs == ()
    trigger = only("ONBUILD COPY <<E /x\nq\nE")
    assert trigger.heredocs[0].content == "q\n"


def test_stages_and_options():
    found = parse(
        "ARG V=1\nFROM --platform=linux/arm64 a:$V AS Base\nCOPY --link --from=x --chown='a b' c d\nFROM base\n"
    )
    first, second = found.stages
    assert (first.base, first.platform, first.name, second.base) == ("a:$V", "linux/arm64", "base", "base")
    copy = first.instructions[0]
    assert copy.has("link") and copy.flag("from") == "x" and copy.flag("chown") == "a b" and copy.text == "c d"
    assert [one.text for one in found.arguments] == ["V=1"]
    assert only("CMD --help").text == "--help"


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("FROM x\nRUM make", ":2:1:", "did you mean RUN?"),
        ("FROM x\n  COPPY a b", ":2:3:", "did you mean COPY?"),
        ("FROM x\nCOPY --form=b a c", ":2:6:", "did you mean --from?"),
        ("FROM x\nRUN a &&\n  make", ":3:3:", '"make" is no instruction'),
        ("RUN x", ":1:1:", "stands before the first FROM"),
        ("FROM a b", ":1:6:", "FROM IMAGE AS NAME"),
        ("FROM a AS 1x", ":1:11:", "cannot be called so"),
        ("FROM x\nRUN <<EOF\nabc", ":2:5:", "<<EOF is never ended"),
        ("FROM x\nCOPY a", ":2:1:", "a source and a target"),
        ("FROM x\nSHELL bash", ":2:1:", "takes a list"),
        ("FROM x\nONBUILD FROM y", ":2:9:", "ONBUILD cannot hold FROM"),
        ("FROM x\nRUN", ":2:1:", "needs something behind it"),
        ("# nothing", "", "there is no FROM"),
    ],
)
def test_errors_name_the_place_and_what_was_meant(text, place, words):
    with pytest.raises(RecipeError) as found:
        parse(text, "D")
    assert str(found.value).startswith(f"D{place}") and words in str(found.value)


def test_list_that_is_none_is_told():
    (remark,) = parse("FROM x\nCMD ['a', 'b']", "D").remarks
    assert remark.startswith("D:2:") and "JSON" in remark
    assert only('CMD ["a", "b"]').listed == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "name", "docker"),
    [
        ("FROM debian", "x", True),
        ("# c\n\nARG A=1\nFROM $A", "x.def", True),
        ("Bootstrap: docker\nFrom: x", "Dockerfile", False),
        ("From: x\nBootstrap: docker", "x", False),
        ("FROM : x", "x", False),
        ("RUN x", "Dockerfile.gpu", True),
        ("RUN x", "a/gpu.Dockerfile", True),
        ("%post\n x", "x.def", False),
    ],
)
def test_a_dockerfile_is_told_from_a_definition_file(text, name, docker):
    assert looks_like(text, name) is docker


VALUES = {"A": "x y", "E": "", "P": "/a/b.tar.gz"}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("$A-${A}", "x y-x y"),
        ("${E:-d} ${E-d} ${N:-d} ${N-d}", "d  d d"),
        ("${A:+w}${E:+w}${E+w}${N+w}", "ww"),
        ("${N:-$A}", "x y"),
        ("${P%.*} ${P%%.*} ${P#*/} ${P##*/}", "/a/b.tar /a/b a/b.tar.gz b.tar.gz"),
        ("${P/a/Z} ${P//a/Z} ${P/a/}", "/Z/b.tar.gz /Z/b.tZr.gz //b.tar.gz"),
        (r"\$A '$A' \"$A\"", '$A $A "x y"'),
        ("'a b'\"c $A\"", "a bc x y"),
        ("$ $N.", "$ ."),
    ],
)
def test_variables(text, result):
    assert Lexer(VALUES).word(text) == result


def test_only_unquoted_variables_are_split():
    assert Lexer(VALUES).words('$A "$A" p$A ""') == ["x", "y", "x y", "px", "y", ""]


@pytest.mark.parametrize("text", ["'a", '"a', "${A", "${A:=b}", "${N:?no}", "${N?}", "${}", "${ A}"])
def test_words_that_cannot_be_read(text):
    with pytest.raises(WordError):
        Lexer(VALUES).word(text)


def test_missing_variables_are_noted():
    lexer = Lexer(VALUES)
    lexer.word("$A ${N:-$M} ${E}")
    assert lexer.missing == {"N", "M"}


def test_env_pairs_in_both_forms():
    assert pairs('A=1 B="x y" C=a\\ b') == [("A", "1"), ("B", '"x y"'), ("C", "a\\ b")]
    assert pairs("A  b c=d") == [("A", "b c=d")]
    for wrong in ("A", "A=1 B", "=x"):
        with pytest.raises(WordError):
            pairs(wrong)


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(st.lists(words, max_size=5))
def test_quoted_words_are_read_back(given):
    text = " ".join("'" + word.replace("'", "'\"'\"'") + "'" for word in given)
    assert Lexer({}).words(text) == given
    assert len(raw_words(text)) == len(given)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_place(text):
    for start in ("", "FROM x\n", "FROM x\nRUN "):
        try:
            found = parse(start + text, "D")
        except RecipeError as error:
            assert str(error).startswith("D")
            continue
        for stage in found.stages:
            for one in stage.instructions:
                again = parse("FROM x\n" + one.written()).stages[0].instructions
                assert [one] == list(again) or one.text.endswith("\\") or "\\" in one.text


@given(st.text("ab*?/!.[]\\- ", max_size=12), st.text("ab/.", min_size=1, max_size=8))
def test_any_ignore_line_has_a_meaning(line, path):
    assert Ignore([line]).excludes(path) in (True, False)


IGNORED = """
# everything but the sources
*
!src
**/*.pyc
/docs/
!docs/keep.md
"""


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("README", True),
        ("src", False),
        ("src/a", False),
        ("src/deep/b.pyc", True),
        ("a.pyc", True),
        ("docs/x", True),
        ("docs/keep.md", False),
    ],
)
def test_last_line_that_matches_decides(path, hidden):
    assert Ignore(IGNORED.splitlines()).excludes(path) is hidden


@pytest.mark.parametrize(
    ("pattern", "path", "hidden"),
    [
        ("*/temp*", "a/temp", True),
        ("*/temp*", "a/b/temp", False),
        ("temp?", "tempa", True),
        ("temp?", "temp", False),
        ("**/x", "x", True),
        ("a/**/x", "a/b/c/x", True),
        ("a/**", "a/b", True),
        ("./a//b/../c", "a/c", True),
        ("a[bc]", "ab", True),
        ("a[^bc]", "ab", False),
        ("a[!bc]", "a!", True),
        ("a\\*", "a*", True),
        ("a\\*", "ab", False),
        ("a.c", "abc", False),
        ("node_modules", "node_modules/x/y", True),
        ("node_modules", "a/node_modules", False),
    ],
)
def test_ignore_patterns(pattern, path, hidden):
    assert Ignore([pattern]).excludes(path) is hidden
