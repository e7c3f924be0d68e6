# SPDX-License-Identifier: Apache-2.0
"""People: accounts through providers, groups, robots, tokens, sessions, quotas, the audit log; over API and pages."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from pysingularity.hub.accounts import providers
from pysingularity.hub.accounts.tokens import add_token
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError
from pysingularity.hub.models import SignIn, Token, User
from pysingularity.hub.settings import load_settings

from .browser import Browser, Page, check
from .conftest import make_data, started
from .forges import Provider
from .shelf import make_sif, put_image
from .world import Answer, Server


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    one = Provider()
    yield one
    one.close()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory, provider: Provider) -> Iterator[tuple[Server, Hub]]:
    """A hub with an OpenID provider, a GitHub, and registration."""
    data = make_data(tmp_path_factory.mktemp("people"))
    credentials = 'client_id = "hub-id"\nclient_secret = "hub-secret"\n'
    with (data / "hub.toml").open("a") as file:
        file.write(
            f'[sign_in]\nregistration = true\n[sign_in.oidc.site]\nissuer = "{provider.url}"\ntitle = "The Site"\n'
            f'{credentials}[sign_in.github]\nurl = "{provider.url}"\n{credentials}'
            "[limits]\nsign_ins_per_minute = 1000\n"
        )
    server = started(data)
    hub = Hub(load_settings(data))
    yield server, hub
    hub.close()
    server.stop()


@pytest.fixture
def server(stand: tuple[Server, Hub]) -> Server:
    return stand[0]


@pytest.fixture
def hub(stand: tuple[Server, Hub]) -> Hub:
    return stand[1]


def through(browser: Browser, way: str, to: str = "/"):
    """Sign in through a provider, which sends the browser straight back."""
    form = browser.hidden("/sign-in", "form")
    return go_on(browser, browser.send(f"/sign-in/{way}", {"form": form, "next": to}))


def go_on(browser: Browser, answer: Answer) -> Answer:
    """Follow the page that leads to a provider."""
    assert answer.status == 200, answer.text
    check(answer)
    to = next(link["href"] for link in Page(answer.text).all("a") if link.get("id") == "leave")
    refresh = next(meta for meta in Page(answer.text).all("meta") if meta.get("http-equiv") == "refresh")
    assert refresh["content"] == f"0; url={to}"
    assert browser.server.url not in to.partition("?")[0]
    return browser.open(to)


def join(browser: Browser, name: str):
    return browser.send("/join", {"form": browser.hidden("/join", "form"), "name": name})


# --- providers -------------------------------------------------------------------------------------------------------


def test_first_sign_in_through_openid_connect_makes_an_account_under_a_name_of_choice(server, hub, provider):
    provider.claims = {"sub": "first", "preferred_username": "Ada.Lovelace", "name": "Ada Lovelace", "email": "a@b.c"}
    browser = Browser(server)
    answer = through(browser, "site")
    assert browser.address.endswith("/join")
    check(answer)
    assert 'value="ada-lovelace"' in answer.text
    assert "The Site" in answer.text
    assert join(browser, "lab").status == 409  # somebody else's name
    assert join(browser, "ada").status == 200
    me = json.loads(browser.send("/account", Accept="application/json").body)
    assert (me["name"], me["display_name"], me["identities"], me["password"]) == (
        "ada",
        "Ada Lovelace",
        ["site"],
        False,
    )
    # the second time there is nothing to choose, and another name over there changes nothing
    provider.claims["preferred_username"] = "somebody"
    again = Browser(server)
    assert "ada" in through(again, "site", "/account").text
    assert again.address.endswith("/account")


def test_github_says_who_somebody_is(server, provider):
    provider.github = {"id": 99, "login": "Grace-H", "name": None, "email": None}
    browser = Browser(server)
    assert 'value="grace-h"' in through(browser, "github").text
    assert join(browser, "grace").status == 200
    assert json.loads(browser.send("/account", Accept="application/json").body)["identities"] == ["github"]


@pytest.mark.browser
def test_a_real_browser_goes_to_the_provider_and_comes_back(server, provider, chromium):
    provider.claims = {"sub": "browser", "preferred_username": "bea"}
    context = chromium.new_context()
    context.set_default_timeout(60_000)
    tab = context.new_page()
    tab.goto(server.url + "/sign-in?next=/account")
    tab.click("text=Sign in with The Site")  # what a form may lead to is limited; the page in between does it
    tab.wait_for_url(server.url + "/join")
    tab.click("text=Make the account")
    tab.wait_for_url(server.url + "/")
    assert "bea" in tab.inner_text("header")
    context.close()


def test_same_mail_address_is_not_the_same_person(server, hub, provider):
    server.post("/api/v1/users", {"name": "victim", "password": "correct horse", "email": "v@example.org"})
    provider.claims = {"sub": "attacker", "preferred_username": "victim", "email": "v@example.org"}
    browser = Browser(server)
    assert through(browser, "site").status == 200
    assert browser.address.endswith("/join")
    assert join(browser, "victim").status == 409


def test_an_account_is_connected_and_disconnected_but_keeps_one_way_in(server, hub, provider):
    provider.claims = {"sub": "connect-me"}
    server.post("/api/v1/users", {"name": "conny", "password": "correct horse"})
    browser = Browser(server)
    browser.sign_in("conny")
    csrf = browser.hidden("/account", "csrf")
    assert browser.send("/sign-in/site", {"csrf": "wrong", "next": "/account"}).status == 403
    go_on(browser, browser.send("/sign-in/site", {"csrf": csrf, "next": "/account"}))
    assert browser.address.endswith("/account")
    assert json.loads(browser.send("/account", Accept="application/json").body)["identities"] == ["site"]
    other = Browser(server)
    through(other, "site")
    assert json.loads(other.send("/account", Accept="application/json").body)["name"] == "conny"
    form = {"csrf": csrf, "action": "disconnect", "value": "site"}
    assert browser.send("/account", form).status == 200
    assert json.loads(browser.send("/account", Accept="application/json").body)["identities"] == []
    # who has no password keeps the way he came by
    provider.claims = {"sub": "no-password"}
    third = Browser(server)
    through(third, "site")
    join(third, "nopass")
    form["csrf"] = third.hidden("/account", "csrf")
    answer = third.send("/account", form)
    assert answer.status == 422
    assert "the only way" in answer.text


@pytest.mark.parametrize("wrong", ["iss", "aud", "nonce", "exp", "sub", "alg", "key", "description"])
def test_wrong_proofs_let_nobody_in(server, provider, wrong: str):
    provider.claims = {"sub": "first"}
    provider.wrong = wrong
    try:
        if wrong == "description":
            settings = load_settings(server.data)
            providers._descriptions.clear()
            with pytest.raises(HubError):
                providers.describe(providers.provider_of(settings, "site"))
            return
        browser = Browser(server)
        answer = through(browser, "site", "/account")
        assert answer.status == 502
        check(answer)
        assert browser.send("/account").text.count("Sign in with The Site") == 1
    finally:
        provider.wrong = ""


def test_new_keys_of_a_provider_are_asked_for(server, provider):
    from joserfc.jwk import RSAKey

    provider.claims = {"sub": "first"}
    assert through(Browser(server), "site", "/account").status == 200
    provider.keys.append(RSAKey.generate_key(2048, {"kid": "two"}))
    assert through(Browser(server), "site", "/account").status == 200


def test_a_return_that_this_browser_did_not_begin_is_refused(server, provider):
    provider.claims = {"sub": "first"}
    victim, attacker = Browser(server), Browser(server)
    form = attacker.hidden("/sign-in", "form")
    attacker.send("/sign-in/site", {"form": form, "next": "/"})
    code, asked = "code-x", {"code_challenge": "x"}
    provider.codes[code] = asked
    for query in ({"code": code, "state": "guess"}, {"code": code}, {"error": "access_denied", "state": "x"}):
        answer = victim.send("/sign-in/site/return?" + urllib.parse.urlencode(query))
        assert answer.status == 400
        assert "begin again" in answer.text
    # neither does a form of another browser begin one, nor a page elsewhere
    assert victim.send("/sign-in/site", {"form": "guess", "next": "/"}).status == 403
    assert victim.send("/sign-in/nobody", {"form": victim.hidden("/sign-in", "form")}).status == 404


def test_sealed_values_open_for_their_purpose_only(hub):
    text = providers.seal(hub.settings, "leave", {"a": 1})
    assert providers.unseal(hub.settings, "leave", text) == {"a": 1}
    for purpose, given in (("stranger", text), ("leave", text[:-2] + "AA"), ("leave", ""), ("leave", "a.b.c")):
        with pytest.raises(HubError):
            providers.unseal(hub.settings, purpose, given)


def test_blocked_people_come_in_by_no_way(server, provider):
    provider.claims = {"sub": "blocked"}
    browser = Browser(server)
    through(browser, "site")
    join(browser, "bob")
    assert server.request("PATCH", "/api/v1/users/bob", {"active": False}).json["active"] is False
    assert browser.send("/account").text.count("Sign in with The Site") == 1
    assert through(Browser(server), "site").status == 403


def test_strangers_make_an_account_where_that_is_allowed(server, tmp_path):
    browser = Browser(server)
    form = {"form": browser.hidden("/join", "form"), "name": "newbie", "password": "short"}
    assert browser.send("/join", form).status == 400
    form |= {"form": browser.hidden("/join", "form"), "password": "long enough"}
    assert browser.send("/join", form).status == 200
    assert json.loads(browser.send("/account", Accept="application/json").body)["name"] == "newbie"
    assert json.loads(browser.send("/account", Accept="application/json").body)["admin"] is False


# --- accounts --------------------------------------------------------------------------------------------------------


def test_a_new_password_signs_every_browser_out(server):
    server.post("/api/v1/users", {"name": "carol", "password": "correct horse"})
    one, two = Browser(server), Browser(server)
    for browser in (one, two):
        browser.sign_in("carol")
    form = {"csrf": one.hidden("/account", "csrf"), "action": "password", "value": "battery staple", "old": "wrong"}
    assert one.send("/account", form).status == 422
    assert one.send("/account", form | {"old": "correct horse"}).status == 200
    assert one.address.endswith("/sign-in?next=/account")
    two.send("/account")
    assert "/sign-in" in two.address
    assert "wrong" in two.sign_in("carol", "correct horse").text
    assert two.sign_in("carol", "battery staple").status == 200


def test_robots_do_what_their_tokens_say_for_their_owner(server, hub, tmp_path):
    server.post("/api/v1/users", {"name": "dave", "password": "correct horse"})
    browser = Browser(server)
    browser.sign_in("dave")
    csrf = browser.hidden("/account", "csrf")
    assert browser.send("/account", {"csrf": csrf, "action": "robot", "value": "dave-ci"}).status == 200
    form = {"csrf": csrf, "action": "token", "value": "ci", "scopes": "push", "robot": "dave-ci", "days": "30"}
    secret = re.search(r"<code>(pyhub_[^<]+)</code>", browser.send("/account", form).text)[1]
    assert len(secret) >= 200
    me = server.get("/api/v1/user", token=secret)
    assert me.status == 403  # the token may push, it may not even read who it is
    collections = {"name": "dave/tools", "git_url": "", "branches": [], "private": True}
    dave = browser.send("/account", form | {"scopes": "admin", "robot": ""}).text
    admin = re.search(r"<code>(pyhub_[^<]+)</code>", dave)[1]
    assert server.post("/api/v1/collections", collections, token=admin).status == 201
    start = "/v2/dave/tools/blobs/uploads/"
    assert server.post(start, token=secret).status == 202
    assert server.post(start.replace("dave", "lab"), token=secret).status == 403
    assert server.request("DELETE", "/api/v1/collections/dave/tools", token=secret).status == 404
    browser.send("/account", {"csrf": csrf, "action": "robot-remove", "value": "dave-ci"})
    assert server.post(start, token=secret).status == 401


def test_tokens_expire_and_are_never_stored(server, hub):
    with hub.write() as session:
        user = session.query(User).filter(User.name == "lab").one()
        secret, row = add_token(session, user, scopes="read", days=1)
        number = row.id
    assert server.get("/api/v1/user", token=secret).status == 200
    with hub.write() as session:
        session.get_one(Token, number).expires_at = 1.0
    answer = server.get("/api/v1/user", token=secret)
    assert answer.status == 401
    assert answer.json["error"]["id"] == "wrong-token"
    for file in hub.settings.data.glob("hub.sqlite*"):
        assert secret.encode() not in file.read_bytes()


@pytest.mark.parametrize(
    ("scope", "allowed"),
    [
        ("read", {"read"}),
        ("push", {"push"}),
        ("build", {"build"}),
        ("admin", {"admin"}),
        ("read,push,build,admin", {"read", "push", "build", "admin"}),
    ],
)
def test_scopes_open_their_own_doors_only(server, hub, tmp_path, scope: str, allowed: set[str]):
    name = f"lab/scope-{'-'.join(sorted(allowed))}"
    put_image(hub, make_sif(tmp_path / "a.sif", name), name, tags=["latest"], private=True)
    token = server.command("token", "create", "--user", "lab", "--scope", scope).strip()
    deeds = {
        "read": lambda: server.get(f"/api/v1/collections/{name}", token=token),
        "push": lambda: server.post(f"/v2/{name}/blobs/uploads/", token=token),
        "build": lambda: server.post(f"/api/v1/collections/{name}/resync", token=token),
        "admin": lambda: server.request("PATCH", f"/api/v1/collections/{name}", {"description": "x"}, token=token),
    }
    for deed, ask in deeds.items():
        assert (ask().status in (200, 202)) == (deed in allowed), deed


def test_sessions_end_and_cookies_are_for_this_hub_only(server, hub):
    browser = Browser(server)
    answer = browser.sign_in()
    assert answer.status == 200
    cookie = next(one for one in browser.jar if one.name == "hub_session")
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert cookie.get_nonstandard_attr("SameSite") == "lax"
    with hub.write() as session:
        session.query(SignIn).update({"expires_at": 1.0})
    browser.send("/account")
    assert "/sign-in" in browser.address


def test_changes_by_a_browser_need_its_secret(server):
    browser = Browser(server)
    browser.sign_in()
    cookie = "; ".join(f"{one.name}={one.value}" for one in browser.jar)
    given = {"Cookie": cookie, "Content-Type": "application/json"}
    body = json.dumps({"name": "csrf-group", "description": ""}).encode()
    refused = server.request("POST", "/api/v1/groups", body, headers=given, token="")
    assert (refused.status, refused.json["error"]["id"]) == (403, "csrf")
    # a form of another site is no JSON and has no secret either
    as_form = {"Cookie": cookie, "Content-Type": "application/x-www-form-urlencoded"}
    assert server.request("POST", "/api/v1/groups", body, headers=as_form, token="").status == 403
    secret = browser.hidden("/account", "csrf")
    made = server.request("POST", "/api/v1/groups", body, headers={**given, "X-CSRF-Token": secret}, token="")
    assert made.status == 201


# --- groups ----------------------------------------------------------------------------------------------------------


def test_groups_own_collections_and_roles_decide(server, hub, tmp_path):
    names = ("gina", "max", "mia", "olaf")
    token = {}
    for name in names:
        assert server.post("/api/v1/users", {"name": name, "password": "correct horse"}).status == 201
        token[name] = server.command("token", "create", "--user", name, "--scope", "read,push,build,admin").strip()
    assert server.post("/api/v1/groups", {"name": "crew"}, token=token["gina"]).status == 201
    for name, role in (("max", "maintainer"), ("mia", "member")):
        assert (
            server.request("PUT", f"/api/v1/groups/crew/members/{name}", {"role": role}, token=token["gina"]).status
            == 200
        )
    new = {"name": "crew/tools", "private": True}
    assert server.post("/api/v1/collections", new, token=token["mia"]).status == 403
    assert server.post("/api/v1/collections", new, token=token["max"]).status == 201
    path = "/api/v1/collections/crew/tools"
    for name, sees, changes, pushes in (
        ("gina", 200, 200, 202),
        ("max", 200, 200, 202),
        ("mia", 200, 403, 202),
        ("olaf", 404, 404, 404),
    ):
        assert server.get(path, token=token[name]).status == sees, name
        changed = server.request("PATCH", path, {"description": "x"}, token=token[name])
        assert changed.status == changes, name
        assert server.post("/v2/crew/tools/blobs/uploads/", token=token[name]).status == pushes, name
    assert server.get(path, token="-").status == 401
    # 404 to a stranger is the same whether there is something or not
    there, missing = (
        server.get(f"/api/v1/collections/crew/{one}", token=token["olaf"]).json for one in ("tools", "none")
    )
    assert there["error"]["id"] == missing["error"]["id"]
    assert server.request("DELETE", "/api/v1/groups/crew/members/gina", token=token["gina"]).status == 409
    assert server.request("DELETE", "/api/v1/groups/crew", token=token["gina"]).status == 409
    assert server.get("/api/v1/groups/crew", token=token["olaf"]).status == 404


def test_pages_of_groups_settings_and_administration_do_their_deeds(server, hub, tmp_path):
    server.post("/api/v1/users", {"name": "erin", "password": "correct horse"})
    browser = Browser(server)
    browser.sign_in("erin")
    csrf = browser.hidden("/account", "csrf")
    assert browser.send("/groups", {"csrf": csrf, "value": "erins", "description": "Friends"}).status == 200
    assert browser.address.endswith("/groups/erins")
    check(browser.send("/groups/erins"))
    assert (
        browser.send("/groups/erins", {"csrf": csrf, "action": "member", "value": "lab", "role": "owner"}).status == 200
    )
    assert (
        browser.send("/groups/erins", {"csrf": csrf, "action": "member", "value": "nobody-x", "role": "owner"}).status
        == 422
    )
    form = {"csrf": csrf, "name": "erin/work", "git_url": "", "branches": ""}
    assert browser.send("/new", form).status == 200
    settings = "/erin/work/settings"
    check(browser.send(settings))
    form = {"csrf": csrf, "action": "general", "description": "For work", "topics": "a, b,", "private": "yes"}
    assert "Saved" in browser.send(settings, form).text
    one = server.get("/api/v1/collections/erin/work").json
    assert (one["description"], one["topics"], one["private"]) == ("For work", ["a", "b"], True)
    form = {
        "csrf": csrf,
        "action": "building",
        "git_url": "ext::sh -c id",
        "branches": "",
        "building": "yes",
        "poll": "0",
    }
    assert browser.send(settings, form).status == 422
    form |= {"git_url": "https://git.example.org/erin/work.git", "branches": "main release/*", "triggers": "tag"}
    assert "Saved" in browser.send(settings, form).text
    one = server.get("/api/v1/collections/erin/work").json
    assert (one["branches"], one["triggers"]) == (["main", "release/*"], ["tag"])
    assert browser.send(settings, form | {"poll": "often"}).status == 422
    assert "Saved" in browser.send(settings, {"csrf": csrf, "action": "keeping", "last": "3", "pulled_days": ""}).text
    assert server.get("/api/v1/collections/erin/work").json["keep"] == {"last": 3.0}
    shared = browser.send(settings, {"csrf": csrf, "action": "share", "value": "course", "days": "7"})
    assert re.search(r"shub://[^/]+/t/[0-9a-f]{22}/erin/work", shared.text)
    share = server.get("/api/v1/collections/erin/work/shares").json["shares"][0]
    assert share["name"] == "course"
    assert browser.send(settings, {"csrf": csrf, "action": "unshare", "value": str(share["id"])}).status == 200
    assert server.get("/api/v1/collections/erin/work/shares").json["shares"] == []
    assert browser.send(settings, {"csrf": csrf, "action": "rename", "value": "job"}).status == 200
    assert browser.send("/erin/job/settings", {"csrf": csrf, "action": "delete", "value": "erin/work"}).status == 409
    assert browser.send("/erin/job/settings", {"csrf": csrf, "action": "delete", "value": "erin/job"}).status == 200
    assert server.get("/api/v1/collections/erin/job").status == 404
    # the administrator's page is nobody else's
    assert browser.send("/admin").status == 403
    assert browser.send("/admin", {"csrf": csrf, "action": "add", "value": "x1"}).status == 403
    boss = Browser(server)
    boss.sign_in()
    csrf = boss.hidden("/admin", "csrf")
    check(boss.send("/admin"))
    new = {"csrf": csrf, "action": "add", "value": "fred", "password": "long enough"}
    assert "was added" in boss.send("/admin", new).text
    assert boss.send("/admin", new).status == 422
    assert "was changed" in boss.send("/admin", {"csrf": csrf, "action": "user", "value": "fred", "quota": "0.5"}).text
    user = server.get("/api/v1/users?q=fred").json["users"][0]
    assert (user["active"], user["quota"]) == (False, 1 << 29)
    assert boss.send("/admin", {"csrf": csrf, "action": "user", "value": "lab", "active": "yes"}).status == 422


def test_audit_log_knows_who_did_what_from_where(server):
    server.post("/api/v1/groups", {"name": "audited"})
    first = server.get("/api/v1/audit?action=group").json["audit"][0]
    assert (first["actor"], first["action"], first["target"]) == ("lab", "group.add", "audited")
    assert first["address"] == "127.0.0.1"
    server.post("/api/v1/users", {"name": "plain", "password": "correct horse"})
    plain = server.command("token", "create", "--user", "plain", "--scope", "admin").strip()
    for path in ("/api/v1/audit", "/api/v1/users", "/api/v1/status"):
        assert server.get(path, token=plain).status == 403
        assert server.get(path, token="-").status == 401
    assert "correct horse" not in server.get("/api/v1/audit?limit=500").text


# --- limits ----------------------------------------------------------------------------------------------------------


def test_quotas_in_bytes_are_told_before_and_hold(server, hub, tmp_path):
    server.post("/api/v1/users", {"name": "quentin", "password": "correct horse"})
    server.request("PATCH", "/api/v1/users/quentin", {"quota": 1000})
    token = server.command("token", "create", "--user", "quentin", "--scope", "push,admin").strip()
    file = make_sif(tmp_path / "a.sif", "quota").read_bytes()
    answer = server.request(
        "POST",
        f"/v2/quentin/tools/blobs/uploads/?digest=sha256:{__import__('hashlib').sha256(file).hexdigest()}",
        file,
        token=token,
        headers={"Content-Type": "application/octet-stream"},
    )
    assert answer.status == 413
    assert server.request("PATCH", "/api/v1/collections/quentin/tools", {"quota": 1 << 30}, token=token).status == 403
    browser = Browser(server)
    browser.sign_in("quentin")
    assert re.search(r"0 B of 1000 B", browser.send("/account").text)


def test_guessing_passwords_ends_with_a_true_429(tmp_path: Path):
    data = make_data(tmp_path)
    with (data / "hub.toml").open("a") as file:
        file.write("[limits]\nsign_ins_per_minute = 3\nrequests_per_minute = 30\n")
    server = started(data)
    try:
        browser = Browser(server)
        statuses = [browser.sign_in("lab", f"guess {number}").status for number in range(5)]
        assert statuses == [401, 401, 401, 429, 429]
        answers = [server.get("/api/v1/collections") for _ in range(40)]
        refused = answers[-1]
        assert refused.status == 429
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json["error"]["code"] == 429
    finally:
        server.stop()
