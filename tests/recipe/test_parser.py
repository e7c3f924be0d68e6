# SPDX-License-Identifier: Apache-2.0
"""The language of definition files, after the patterns of public ones; the real Apptainer judges what is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pysingularity.errors import RecipeError, UserError
from pysingularity.recipe import templates
from pysingularity.recipe.model import APP_SECTIONS, SECTIONS, Recipe, Section, Stage
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import check, file_pairs, interpreter, labels, shell_of
from pysingularity.recipe.writer import write

TWO_STAGES = """\
Bootstrap: docker
From: golang:1.22
Stage: devel

%files
    hello.go /go/src/

%post
    go build -o /usr/local/bin/hello

Bootstrap: library
From: alpine:3.18
Stage: final

%files from devel
  /usr/local/bin/hello /usr/local/bin/hello
"""


def refused(text: str, **options) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        parse(text, "x.def", **options)
    return caught.value


def only(text: str) -> Stage:
    (stage,) = parse(text).stages
    return stage


def test_header_keywords_are_lower_case_whatever_the_spelling():
    stage = only("BootStrap: docker\nFROM :ubuntu:18.04\n")
    assert stage.header == {"bootstrap": "docker", "from": "ubuntu:18.04"}
    assert stage.lines == {"bootstrap": 1, "from": 2}


def test_comment_cuts_a_header_value():
    assert only("# top\nBootstrap: docker\n#From: x\nFrom: y # why\n").header["from"] == "y"


def test_header_continuation_joins_lines_and_keeps_line_breaks_when_asked():
    text = "Bootstrap: yum\nInclude: a \\\n  b\nSetopt: x \\n\\\n y\n"
    assert only(text).header == {"bootstrap": "yum", "include": "a b", "setopt": "x \ny"}


def test_numbered_keyword_is_known():
    assert only("Bootstrap: zypper\nOtherURL1: http://x\n").header["otherurl1"] == "http://x"


def test_stages_begin_at_every_bootstrap_line():
    recipe = parse(TWO_STAGES)
    assert [stage.name for stage in recipe.stages] == ["devel", "final"]
    assert [stage.line for stage in recipe.stages] == [1, 11]
    check(recipe)
    (pair,) = file_pairs(recipe.stages[1], "x")
    assert (pair.source, pair.target, pair.stage, pair.line) == (
        "/usr/local/bin/hello",
        "/usr/local/bin/hello",
        "devel",
        16,
    )


def test_body_is_verbatim_and_crlf_becomes_lf():
    stage = only("Bootstrap: scratch\r\n%post\r\n\techo 1\r\n\r\n    cat <<X\r\n  y\r\nX\r\n")
    assert stage.body("post") == "\techo 1\n\n    cat <<X\n  y\nX\n"


def test_last_line_without_line_feed_counts():
    assert only("Bootstrap: scratch\n%post\necho 1").body("post") == "echo 1\n"
    assert only("Bootstrap: scratch\n%post").has("post")


def test_repeated_sections_add_up_and_the_last_arguments_win():
    stage = only("Bootstrap: scratch\n%post -c /bin/bash\na\n%labels\nX 1\n%post\nb\n%labels\nX 2\n")
    assert stage.body("post") == "a\nb\n"
    assert stage.arguments("post") == "-c /bin/bash"
    assert shell_of(stage.arguments("post")) == "/bin/bash"
    assert labels(stage.body("labels")) == {"X": "2"}


def test_percent_line_inside_a_here_document_starts_a_section():
    stage = only("Bootstrap: scratch\n%post\ncat > x <<E\n%help\nE\n")
    assert stage.body("post") == "cat > x <<E\n" and stage.body("help") == "E\n"


def test_indented_section_line_starts_a_section():
    assert only("Bootstrap: scratch\n  %post\nx\n").body("post") == "x\n"


def test_sections_of_apps_keep_their_order_and_name():
    stage = only("Bootstrap: scratch\n%apprun zeta\nz\n%post\np\n%appinstall alpha\na\n%apprun zeta\nzz\n")
    assert stage.apps == ["zeta", "alpha"]
    assert stage.body("apprun", "zeta") == "z\nzz\n"
    assert stage.body("apprun", "alpha") == ""


def test_file_without_header_is_language_but_no_build():
    recipe = parse("%post\necho\n", "x.def")
    with pytest.raises(RecipeError, match="no header") as caught:
        check(recipe)
    assert str(caught.value).startswith("x.def:1: ")


def test_byte_order_mark_is_no_part_of_the_first_keyword():
    assert parse("\ufeffBootstrap: docker\nFrom: x\n".encode()).stages[0].agent == "docker"


def test_bytes_that_are_not_utf8_survive():
    body = parse(b"Bootstrap: scratch\n%post\necho \xff\n").stages[0].body("post")
    assert body.encode("utf-8", "surrogateescape") == b"echo \xff\n"


@pytest.mark.parametrize(
    ("line", "guess"),
    [
        ("%label", "%labels"),
        ("%environments", "%environment"),
        ("%install", "%post"),
        ("%run", "%runscript"),
        ("%applabel x", "%applabels"),
        ("%enviornment", "%environment"),
        ("%hel", "%help"),
        ("%check", "%test"),
        ("%export", "%environment"),
        ("%configure", "%post"),
        ("% post", "%post"),
        ("%post\tx", "%post"),
        ("%", "another character"),
        ("%s:%d", "another character"),
    ],
)
def test_unknown_section_names_its_place_and_the_nearest_name(line, guess):
    error = refused(f"Bootstrap: scratch\n\n%post\n  true\n {line}\n")
    assert (error.id, error.line, error.column) == ("unknown-section", 5, 2)
    assert error.text.strip() == line.strip()
    assert guess in error.hint


@pytest.mark.parametrize(
    ("line", "id", "hint"),
    [
        ("Form: x", "unknown-keyword", "did you mean From?"),
        ("MirorURL: x", "unknown-keyword", "did you mean MirrorURL?"),
        ("name: x", "unknown-keyword", "%labels"),
        ("MetaLink: x", "unknown-keyword", "keywords: "),
        ('DistType "debian"', "header-line", "did you mean Bootstrap: debian?"),
        ("apt-get update", "header-line", "%post"),
        ("<!DOCTYPE html>", "header-line", "raw"),
    ],
)
def test_wrong_header_line_names_its_place(line, id, hint):  # noqa: A002
    error = refused(f"Bootstrap: docker\nFrom: x\n\n  {line}\n")
    assert (error.id, error.line, error.column) == (id, 4, 3)
    assert hint in error.hint
    assert str(error).startswith("x.def:4:3: ")


def test_app_section_without_a_name_is_refused():
    assert refused("Bootstrap: scratch\n%appinstall\n").id == "app-name"
    assert refused("Bootstrap: scratch\n%appinstall ../x\n").id == "app-name"


@pytest.mark.parametrize(("text", "id"), [("", "no-stages"), ("# only\n\n", "no-stages"), ("a\0b", "not-text")])
def test_nothing_to_build_is_refused(text, id):  # noqa: A002
    assert refused(text).id == id


def test_huge_file_is_refused_unread():
    assert refused("#" * (17 << 20)).id == "too-large"


# -- templates


def test_templates_take_the_command_line_then_the_defaults():
    text = "Bootstrap: docker\nFrom: {{ IMG }}:{{TAG}}\n%arguments\nIMG = debian\nTAG={{ IMG }}-1\n# X=1\n"
    text += "%post\necho {{ TAG }}\n"
    recipe = parse(text, arguments={"IMG": "ubuntu"})
    assert recipe.stages[0].header["from"] == "ubuntu:ubuntu-1"
    assert recipe.stages[0].body("post") == "echo ubuntu-1\n"
    assert "TAG=ubuntu-1\n" in recipe.text and "From: ubuntu:ubuntu-1\n" in recipe.text
    assert recipe.unused == ()


def test_template_without_a_value_names_its_place():
    error = refused("Bootstrap: docker\nFrom: a\n%post\n  echo {{ TAGG }}\n%arguments\nTAG=1\n", arguments={})
    assert (error.id, error.line, error.column) == ("template-undefined", 4, 8)
    assert "TAG }}" in error.hint


def test_template_behind_a_comment_sign_is_left_alone():
    text = "Bootstrap: scratch\n%post\n# {{ X }}\necho '#' {{ X }}\n"
    assert parse(text, arguments={}).stages[0].body("post") == "# {{ X }}\necho '#' {{ X }}\n"
    assert refused("Bootstrap: scratch\n%post\n#{{ X }}\n", arguments={}).id == "template-undefined"
    assert refused("Bootstrap: scratch\n%runscript\n#!{{ X }}\n", arguments={}).id == "template-undefined"


def test_defaults_belong_to_their_stage():
    text = "Bootstrap: scratch\n%arguments\nA=1\n%post\n{{ A }}\nBootstrap: scratch\n%post\n{{ A }}\n"
    assert refused(text, arguments={}).line == 8


def test_values_with_line_breaks_do_not_move_the_places_of_errors():
    text = "Bootstrap: scratch\n%post\n{{ A }}\n%pots\n"
    assert refused(text, arguments={"A": "1\n2\n3"}).line == 4


def test_given_but_unused_build_argument_is_reported():
    assert parse("Bootstrap: scratch\n", arguments={"A": "1"}).unused == ("A",)
    text = "Bootstrap: scratch\n%arguments\nB={{ A }}\n%post\n{{ B }}\n"
    assert parse(text, arguments={"A": "1"}).unused == ()


def test_line_of_arguments_that_is_no_pair_is_skipped_with_a_remark():
    recipe = parse("Bootstrap: scratch\n%arguments\nbad\n", "x.def", {})
    assert recipe.remarks[0].startswith("x.def:3: ")


def test_build_arguments_of_a_file_give_way_to_the_command_line(tmp_path):
    path = tmp_path / "args"
    path.write_text("# c\nA=1\n\nB = 2\n")
    assert templates.from_options(["A=3", "C=x=y"], str(path)) == {"A": "3", "B": "2", "C": "x=y"}
    with pytest.raises(UserError):
        templates.from_options(["A"])
    with pytest.raises(UserError, match="cannot be read"):
        templates.from_options([], str(tmp_path / "none"))


# -- lines of sections


def test_files_lines_with_quotes_comments_and_missing_targets():
    stage = only(
        'Bootstrap: scratch\n%files\n  # c\n  a\n  "b c" /d e.txt\n'
        "  'f g' \"/h i/\"  # why\n  *.py /opt/\n don't.txt\n"
    )
    remarks: list[str] = []
    pairs = file_pairs(stage, "x.def", remarks=remarks)
    assert [(pair.source, pair.target, pair.line) for pair in pairs] == [
        ("a", "", 4),
        ("b c", "/d", 5),
        ("f g", "/h i/", 6),
        ("*.py", "/opt/", 7),
        ("don't.txt", "", 8),
    ]
    assert remarks == ['x.def:5: ignored, a line of %files has a source and a target: "e.txt"']


def test_open_quote_in_files_is_refused_and_odd_arguments_are_told():
    with pytest.raises(RecipeError, match="never closed") as caught:
        file_pairs(only('Bootstrap: scratch\n%files\n"a b\n'), "x.def")
    assert caught.value.line == 3
    remarks: list[str] = []
    assert file_pairs(only("Bootstrap: scratch\n%files to x\n /a\n"), "x.def", remarks=remarks)[0].stage == ""
    assert "from STAGE" in remarks[0]


def test_files_from_a_stage_that_is_not_above_is_refused():
    with pytest.raises(RecipeError, match='no stage "devl"') as caught:
        check(parse(TWO_STAGES.replace("from devel", "from devl"), "x.def"))
    assert caught.value.hint == "stages above: devel"
    assert caught.value.line == 15


def test_interpreter_line_of_a_body_wins_over_the_section_arguments():
    assert interpreter("#!/bin/bash -e\nx\n", "-x") == ("#!/bin/bash -e", "x\n")
    assert interpreter("x\n", "-x") == ("#!/bin/sh -x", "x\n")
    assert interpreter("x\n", "") == ("#!/bin/sh", "x\n")


def test_label_values_keep_their_blanks():
    assert labels(" Author  Jane Doe <j@x>\n# c\nEmpty\nA\tb\n") == {"Author": "Jane Doe <j@x>", "Empty": "", "A": "b"}


# -- what is written is read back equal

_line = st.text(st.characters(blacklist_characters="\n\r\0\ufeff", blacklist_categories=["Cs"]), max_size=20).filter(
    lambda line: line.lstrip()[:1] != "%" and line[:10].lower() != "bootstrap:"
)
_body = st.lists(_line, max_size=5).map(lambda lines: "".join(line + "\n" for line in lines))
_arguments = _line.map(lambda text: text.strip("\n"))
_plain = st.builds(Section, st.sampled_from(SECTIONS), _arguments, _body)
_app = st.builds(
    Section,
    st.sampled_from(APP_SECTIONS),
    st.tuples(st.from_regex(r"[a-z]{1,8}", fullmatch=True), _arguments).map(lambda two: " ".join(two)),
    _body,
)
_value = st.text(
    st.characters(blacklist_characters="#\n\r\0\\", blacklist_categories=["Cs"], max_codepoint=0x2000), max_size=20
).map(str.strip)
_header = st.dictionaries(st.sampled_from(["from", "stage", "include", "otherurl7", "setopt"]), _value).map(
    lambda more: {"bootstrap": "scratch", **more}
)


@given(st.lists(st.builds(Stage, _header, st.lists(st.one_of(_plain, _app), max_size=4)), min_size=1, max_size=3))
def test_what_is_written_is_read_back_equal(stages):
    recipe = Recipe(stages)
    assert parse(write(recipe)) == recipe


@given(st.lists(st.sampled_from(["a", "b c", "x \\", ""]), min_size=1, max_size=3))
def test_header_values_with_line_breaks_are_read_back_equal(parts):
    value = "\n".join(parts).strip()
    if value.endswith("\\") or any(part != part.lstrip() for part in value.split("\n")):
        return
    recipe = Recipe([Stage({"bootstrap": "yum", "setopt": value})])
    assert parse(write(recipe)) == recipe


@settings(max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [*"abc:%#\\\n\r\t {}=\"'", "\n%post", "\nBootstrap: ", "{{ A }}", "\n%arguments\nA=1\n", "%appfiles x"]
        ),
        max_size=60,
    ).map("".join)
)
def test_any_text_gives_a_recipe_or_one_clear_error(text):
    try:
        recipe = parse(text, "x.def", {})
        for stage in recipe.stages:
            file_pairs(stage, "x.def")
        check(recipe)
    except RecipeError as error:
        assert error.line <= text.count("\n") + 1
        assert "\n" not in error.message


@given(st.binary(max_size=200))
def test_any_bytes_give_a_recipe_or_one_clear_error(data):
    try:
        parse(data, "x.def", {})
    except RecipeError as error:
        assert error.id
