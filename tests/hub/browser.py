# SPDX-License-Identifier: Apache-2.0
"""A browser without scripts, and what is true of every page: the rules of a hub's pages as assertions."""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from html.parser import HTMLParser
from http.cookiejar import CookieJar

from .world import Answer, Server


class Page(HTMLParser):
    """What is on a page."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class Browser:
    """A browser without scripts: cookies, forms, redirects."""

    def __init__(self, server: Server) -> None:
        self.server, self.jar = server, CookieJar()
        self.opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPCookieProcessor(self.jar)
        )
        self.address = ""

    def send(self, path: str, form: dict[str, str] | None = None, **headers: str) -> Answer:
        data = urllib.parse.urlencode(form).encode() if form is not None else None
        return self.open(self.server.url + path, data, **headers)

    def open(self, url: str, data: bytes | None = None, **headers: str) -> Answer:
        request = urllib.request.Request(url, data, {"Accept": "text/html", **headers})
        try:
            with self.opener.open(request, timeout=30) as answer:
                self.address = answer.url
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def hidden(self, path: str, name: str) -> str:
        for field in Page(self.send(path).text).all("input"):
            if field.get("name") == name:
                return field["value"] or ""
        raise AssertionError(f"{path} has no field {name}")

    def sign_in(self, name: str = "lab", password: str = "correct horse", to: str = "/") -> Answer:
        form = self.hidden("/sign-in", "form")
        return self.send("/sign-in", {"form": form, "name": name, "password": password, "next": to})


def page(server: Server, path: str, status: int = 200) -> Page:
    """Return a page as strangers see it, after checking what is true of all pages."""
    answer = Browser(server).send(path)
    assert answer.status == status, answer.text[:2000]
    return check(answer)


def check(answer: Answer) -> Page:
    found = Page(answer.text)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert found.all("html")[0]["lang"] == "en"
    assert any(meta.get("name") == "viewport" for meta in found.all("meta"))
    assert len(found.all("h1")) == 1
    assert next(int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)) == 1
    assert all("alt" in image for image in found.all("img"))
    names = [label.get("for") for label in found.all("label")]
    text = answer.text
    labels = re.findall(r"<label.*?</label>", text, re.DOTALL)
    for field in found.all("input"):
        if field.get("type") != "hidden":
            inside = [one for one in labels if f'name="{field["name"]}"' in one]
            assert inside or field.get("id") in names, field
    for table in re.findall(r"<table.*?</table>", text, re.DOTALL):
        assert "<caption" in table
        assert "<th scope=" in table
    for tag, attributes in found.tags:
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "action", "data-stream"):
            value = attributes.get(name) or ""
            assert not value.lower().startswith("javascript:")
            if tag != "a" and value:
                assert value.startswith(("/", "data:,")), (tag, value)
                assert not value.startswith("//")
    known = ("/static/hub.js", "/static/htmx.js", "/static/log.js")
    assert all(script.get("src") in known for script in found.all("script"))
    return found
