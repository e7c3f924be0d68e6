# SPDX-License-Identifier: Apache-2.0
"""Logging in without a network, and where names and passwords are found."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pysingularity.errors import RegistryError, UserError
from pysingularity.registry import config, credentials
from pysingularity.registry.auth import Ask, Challenge, Credentials, log_in, parse_challenges

ME = Credentials("me", "secret")


def drive(flow, *answers):
    """Send answers to a login and return (requests, result)."""
    asked, replies = [], list(answers)
    try:
        step = next(flow)
        while True:
            asked.append(step)
            step = flow.send(replies.pop(0))
    except StopIteration as done:
        return asked, done.value


def test_challenges_with_commas_quotes_and_several_schemes():
    found = parse_challenges(
        'Bearer realm="https://a/t?x=1,2",service="s \\"q\\"",scope="repository:a/b:pull,push", Basic realm=x'
    )
    assert found == [
        Challenge("bearer", {"realm": "https://a/t?x=1,2", "service": 's "q"', "scope": "repository:a/b:pull,push"}),
        Challenge("basic", {"realm": "x"}),
    ]


@given(st.text(max_size=200))
def test_any_challenge_is_read_without_an_error(text):
    parse_challenges(text)


def test_token_is_asked_for_with_name_and_scope_and_used_as_bearer():
    flow = log_in([Challenge("bearer", {"realm": "https://t/x", "service": "s"})], ME, ["repository:a/b:pull"])
    asked, found = drive(flow, (200, b'{"access_token": "abc", "expires_in": 300}'))
    assert asked[0].url == "https://t/x?service=s&scope=repository%3Aa%2Fb%3Apull&account=me"
    assert asked[0].headers["Authorization"] == ME.basic()
    assert found.header == "Bearer abc"


def test_identity_token_goes_by_post():
    flow = log_in([Challenge("bearer", {"realm": "https://t/x"})], Credentials("", "", "idt"), ["r"])
    asked, found = drive(flow, (200, b'{"token": "abc"}'))
    assert (asked[0].method, b"refresh_token=idt" in asked[0].body, found.header) == ("POST", True, "Bearer abc")


def test_basic_only_with_a_name_and_password_never_in_the_clear():
    basic = [Challenge("basic", {})]
    assert drive(log_in(basic, ME, []))[1].header == "Basic " + base64.b64encode(b"me:secret").decode()
    assert drive(log_in(basic, None, []))[1] is None
    with pytest.raises(RegistryError, match="in the clear"):
        drive(log_in([Challenge("bearer", {"realm": "http://t/x"})], ME, [], secure=True))


@pytest.mark.parametrize(
    "answer", [(200, b"nonsense"), (200, b"[]"), (200, b'{"token": "a\\nb"}'), (401, b""), (500, b"")]
)
def test_token_server_that_fails_is_one_error(answer):
    with pytest.raises(RegistryError):
        drive(log_in([Challenge("bearer", {"realm": "https://t/x"})], ME, ["r"]), answer)
    assert isinstance(Ask("GET", "x", {}), Ask)


def put(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def auth(text):
    return {"auth": base64.b64encode(text.encode()).decode()}


def test_files_are_asked_in_order_and_keys_in_every_spelling(tmp_path, environ):
    home = tmp_path / "home"
    put(
        home / ".docker/config.json",
        {"auths": {"https://index.docker.io/v1/": auth("hub:p"), "reg.test:5000": auth("d:p")}},
    )
    assert credentials.find("docker.io", "library/x", environ) == Credentials("hub", "p")
    assert credentials.find("reg.test:5000", "a", environ) == Credentials("d", "p")
    put(home / ".singularity/docker-config.json", {"auths": {"reg.test:5000": auth("own:p:q")}})
    assert credentials.find("reg.test:5000", "a", environ) == Credentials("own", "p:q")
    put(
        home / ".config/containers/auth.json", {"auths": {"other.test/lab": auth("lab:p"), "other.test": auth("all:p")}}
    )
    assert credentials.find("other.test", "lab/x", environ).user == "lab"
    assert credentials.find("other.test", "x", environ).user == "all"
    assert credentials.find("nobody.test", "x", environ) is None
    with pytest.raises(UserError, match="no such file"):
        credentials.find("nobody.test", "x", environ, str(tmp_path / "none"))


def test_credential_helper_is_asked_as_docker_asks_it(tmp_path, environ):
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    helper.write_text(
        '#!/bin/sh\nread s; [ "$s" = reg.test ] || exit 1\necho \'{"Username": "<token>", "Secret": "idt"}\'\n'
    )
    helper.chmod(0o755)
    environ["PATH"] = f"{helper.parent}:{environ['PATH']}"
    put(tmp_path / "home/.docker/config.json", {"credHelpers": {"reg.test": "test"}, "credsStore": "test"})
    import os

    old = os.environ["PATH"]
    os.environ["PATH"] = environ["PATH"]
    try:
        assert credentials.find("reg.test", "x", environ) == Credentials("", "", "idt")
        assert credentials.find("else.test", "x", environ) is None
    finally:
        os.environ["PATH"] = old


def test_stored_passwords_are_for_the_owner_alone_and_can_be_removed(tmp_path, environ):
    path = credentials.own_file(environ)
    assert credentials.store(path, "reg.test", ME)
    assert (tmp_path / "home/.singularity/docker-config.json").stat().st_mode & 0o777 == 0o600
    assert credentials.find("reg.test", "x", environ) == ME
    assert credentials.store(path, "reg.test", None)
    assert credentials.find("reg.test", "x", environ) is None


def test_variables_are_found_with_and_without_prefix():
    assert credentials.given({"DOCKER_USERNAME": "a", "DOCKER_PASSWORD": "b"}) == Credentials("a", "b")
    both = {"SINGULARITY_DOCKER_USERNAME": "s", "SINGULARITY_DOCKER_PASSWORD": "t", "DOCKER_USERNAME": "a"}
    assert credentials.given(both) == Credentials("s", "t")


def test_mirrors_come_first_and_the_longest_prefix_wins(tmp_path, environ):
    path = tmp_path / "registries.conf"
    path.write_text(
        '[[registry]]\nprefix = "reg.test"\nlocation = "new.test/base"\n[[registry.mirror]]\nlocation = "m.test/x"\n'
        'insecure = true\n[[registry.mirror]]\nlocation = "d.test"\npull-from-mirror = "digest-only"\n'
        '[[registry]]\nprefix = "reg.test/bad"\nblocked = true\n'
    )
    environ["CONTAINERS_REGISTRIES_CONF"] = str(path)
    tables = config.load(environ)
    assert config.endpoints(tables, "reg.test", "a/b", digest=False) == [
        config.Endpoint("m.test", "x/a/b", True, True),
        config.Endpoint("new.test", "base/a/b"),
    ]
    assert config.endpoints(tables, "reg.test", "a", digest=True)[1].host == "d.test"
    assert config.endpoints(tables, "other.test", "a", digest=False) == [config.Endpoint("other.test", "a")]
    with pytest.raises(UserError, match="blocks"):
        config.endpoints(tables, "reg.test", "bad/x", digest=False)
    path.write_text("[[registry")
    with pytest.raises(UserError):
        config.load(environ)
