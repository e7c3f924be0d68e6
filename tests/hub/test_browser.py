# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser: narrow and wide, light and dark, with scripts and without, by keyboard.

HUB_TEST_PICTURES=FOLDER keeps a picture of every page for a person to look at; AXE=FILE (`axe.min.js` of axe-core) lets
axe judge every page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pysingularity.hub.builds.log import log_path
from pysingularity.hub.builds.queue import claim
from pysingularity.hub.builds.states import move
from pysingularity.hub.catalog import find_collection
from pysingularity.hub.context import Hub
from pysingularity.hub.models import Build, Delivery, Recipe
from pysingularity.hub.settings import load_settings

from .conftest import make_data, started
from .shelf import make_sif, put_image
from .test_pages import put_build
from .world import Server, wait_for

pytestmark = pytest.mark.browser

LOG = b"".join(
    b"==> %s\n" % title + b"line\n" * 5 + b"\x1b[32mgreen\x1b[0m and <b>plain</b>\n"
    for title in (b"One", b"Two", b"Three", b"Four")
)
PAGES = (
    "/",
    "/search?q=tools",
    "/lab",
    "/lab/tools",
    "/lab/tools/builds/1",
    "/lab/tools/images/2",
    "/lab/tools/compare/1...2",
    "/lab/tools/settings",
    "/lab/tools/deliveries/1",
    "/lab/empty",
    "/account",
    "/groups",
    "/groups/crew",
    "/new",
    "/admin",
    "/api",
    "/nobody/nothing",
)


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Hub]]:
    """A hub with something on every page, and no workers that would change it."""
    folder = tmp_path_factory.mktemp("browser")
    data = make_data(folder)
    (data / "hub.toml").write_text((data / "hub.toml").read_text().replace("[builds]", "[builds]\nworkers = 0"))
    server = started(data)
    hub = Hub(load_settings(data))
    for number, text in enumerate(("one", "two")):
        put_image(hub, make_sif(folder / f"{number}.sif", text, pad=100_000 * number), "lab/tools", tags=["latest"])
    put_image(
        hub,
        make_sif(folder / "long.sif", "long"),
        "lab/a-name-that-is-as-long-as-names-of-collections-may-be-here-0001",
        tags=["v1"],
    )
    put_build(hub, log=LOG, state="done")
    put_build(hub, log=LOG, state="failed", reason="%post ended with status 1")
    server.post("/api/v1/collections", {"name": "lab/empty"})
    server.post("/api/v1/groups", {"name": "crew", "description": "Everybody"})
    server.command("user", "add", "mia", "--password-stdin", text="long enough\n")
    server.request("PUT", "/api/v1/groups/crew/members/mia", {"role": "member"})
    with hub.write() as session:
        one = find_collection(session, "lab", "tools")
        assert one is not None
        one.git_url, one.description, one.topics = "https://git.example.org/lab/tools.git", "For the course", ["python"]
        for path, tag in (("Singularity", "latest"), ("deep/er/folder/Singularity.gpu", "gpu")):
            values = {"commit": "a" * 40, "changed_at": 1.0, "base": "nvidia/cuda:12.4.1-runtime-ubuntu22.04"}
            session.add(Recipe(collection_id=one.id, branch="main", path=path, tag=tag, **values))
        values = {"delivery": "1", "forge": "gitea", "event": "push", "status": 202, "state": "done"}
        session.add(Delivery(collection_id=one.id, body='{"ref": "main"}', headers={"x": "y"}, **values))
    yield server, hub
    hub.close()
    server.stop()


class Tab:
    """A page of the browser that notes what it must not do: ask other hosts, break a rule, fail in a script."""

    def __init__(self, chromium: Any, server: Server, **options: Any) -> None:
        self.server, self.wrong = server, []
        self.context = chromium.new_context(**options)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.page.on("request", self._request)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.server.url + "/", "data:")):
            self.wrong.append(request.url)

    def _console(self, message: Any) -> None:
        # The page with status 404 that is asked for is no mistake of that page.
        missing = "status of 404" in message.text and message.location.get("url", "").endswith("/nobody/nothing")
        if message.type in ("error", "warning") and not missing:
            self.wrong.append(message.text)

    def open(self, path: str) -> Any:
        self.page.goto(self.server.url + path)
        return self.page

    def sign_in(self) -> None:
        self.open("/sign-in")
        self.page.fill("[name=name]", "lab")
        self.page.fill("[name=password]", "correct horse")
        self.page.click("main button.main")
        self.page.wait_for_url(self.server.url + "/")


@pytest.fixture
def tab(chromium: Any, stand: tuple[Server, Hub]) -> Iterator[Tab]:
    """A signed-in tab."""
    one = Tab(chromium, stand[0])
    one.sign_in()
    yield one
    one.context.close()
    assert one.wrong == []


@pytest.mark.parametrize("scripts", [True, False], ids=["scripts", "plain"])
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light"), (360, "light"), (1280, "dark")])
def test_every_page_fits_and_asks_nobody_else(chromium, stand, width: int, scheme: str, scripts: bool):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme, "java_script_enabled": scripts}
    tab = Tab(chromium, stand[0], **options)
    tab.sign_in()
    for path in PAGES:
        page = tab.open(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
        if folder := os.environ.get("HUB_TEST_PICTURES"):
            name = path.strip("/").replace("/", "_") or "home"
            page.screenshot(path=f"{folder}/{name}-{width}-{scheme}{'' if scripts else '-plain'}.png", full_page=True)
    tab.context.close()
    assert tab.wrong == []


#: Contrast of every text with what is behind it (WCAG 2.2, 1.4.3), names of everything that can be used (4.1.2).
JUDGE = """() => {
  const found = [];
  const colour = text => { const m = text.match(/[\\d.]+/g).map(Number); return {rgb: m.slice(0, 3), a: m[3] ?? 1}; };
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const back = node => { for (; node; node = node.parentElement) {
    const c = colour(getComputedStyle(node).backgroundColor);
    if (c.a === 1) return c.rgb; } return [255, 255, 255]; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const box = node.parentElement;
    if (!node.data.trim() || !box.checkVisibility() || box.closest("svg, noscript, script, .skip")) continue;
    const style = getComputedStyle(box);
    const [one, two] = [light(colour(style.color).rgb), light(back(box))].sort((a, b) => b - a);
    const ratio = (one + 0.05) / (two + 0.05);
    const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: ${node.data.trim().slice(0, 40)}`);
  }
  for (const one of document.querySelectorAll("a[href], button, input:not([type=hidden]), select, textarea, summary")) {
    const name = one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.[0]?.textContent.trim()
      || one.querySelector("img[alt]")?.alt || one.querySelector("title")?.textContent;
    if (!name) found.push(`no name: ${one.outerHTML.slice(0, 120)}`);
  }
  const ids = [...document.querySelectorAll("[id]")].map(one => one.id);
  for (const id of new Set(ids)) if (ids.filter(one => one === id).length > 1) found.push(`id twice: ${id}`);
  let level = 0;
  for (const one of document.querySelectorAll("main h1, main h2, main h3, main h4")) {
    const now = Number(one.tagName[1]);
    if (now > level + 1) found.push(`heading ${one.textContent} skips a level`);
    level = now;
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_read_by_everybody(chromium, stand, scheme: str):
    tab = Tab(chromium, stand[0], color_scheme=scheme)
    axe = Path(os.environ.get("AXE", "/nowhere"))
    tab.sign_in()
    found = {}
    for path in (*PAGES, "/sign-in"):
        page = tab.open(path)
        found[path] = page.evaluate(JUDGE)
        if axe.exists():
            page.evaluate(axe.read_text())
            judged = page.evaluate("async () => (await axe.run()).violations.map(v => v.id + ' ' + v.nodes[0].html)")
            found[path] += judged
    tab.context.close()
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


def test_everything_is_reached_by_keyboard(tab: Tab):
    page = tab.open("/lab/tools")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    seen = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.outerHTML"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if page.evaluate("document.activeElement === document.body"):
            break
        assert outline != "none"
    wanted = page.evaluate(
        "[...document.querySelectorAll('main a[href], main button, main summary')].map(one => one.outerHTML)"
    )
    assert set(wanted) - seen == set(wanted[:1]) - seen  # the first was reached before the count began
    page.locator("text=☆ Star").press("Enter")
    page.wait_for_selector("text=★ Starred")
    page.locator("text=★ Starred").press("Space")
    page.wait_for_selector("text=☆ Star")


def test_live_log_grows_folded_and_coloured(tab: Tab, stand: tuple[Server, Hub]):
    hub = stand[1]
    number = put_build(hub, state="queued", claimed_at=None, finished_at=None)
    page = tab.open(f"/lab/tools/builds/{number}")
    assert "Waiting for a free worker" in page.inner_text("main")
    with hub.write() as session:
        assert claim(session, worker="w", lease=600, active_per_collection=5) == number
        move(session, number, "cloning", worker="w")
    page.wait_for_selector("#state.cloning")
    file = log_path(hub.settings.folder("logs"), number).open("ab", buffering=0)
    file.write(b"==> First\n\x1b[31mred\x1b[0m <i>text</i>\nbar 10%\rbar 100%\n")
    page.wait_for_selector("details.step[open] >> text=bar 100%")
    assert page.inner_text(".fg-red") == "red"
    assert page.locator("#log i").count() == 0
    assert "10%" not in page.inner_text("#log").replace("100%", "")
    file.write(b"==> Second\nmore\n")
    page.wait_for_selector("text=more")
    assert page.locator("details.step").count() == 2
    assert page.locator("details.step[open]").count() == 1  # what is over is folded
    page.locator("summary >> text=First").press("Enter")
    assert page.locator("details.step[open]").count() == 2
    file.close()
    with hub.write() as session:
        move(session, number, "building", worker="w")
        move(session, number, "failed", worker="w", reason="that was it")
    page.wait_for_selector("text=that was it")
    assert "Build again" in page.inner_text("main")


def test_search_answers_while_one_types(tab: Tab):
    page = tab.open("/search")
    page.wait_for_load_state("networkidle")
    page.locator("#words").press_sequentially("a-name-that", delay=20)
    wait_for(lambda: page.locator("#found li").count() == 1, what="the answer")
    page.fill("#words", "nothing has this name")
    page.wait_for_selector("text=No collection has all of these words.")


def test_folders_of_an_image_open_in_place(tab: Tab, stand: tuple[Server, Hub], tmp_path: Path):
    files = {"usr/lib/big": os.urandom(200_000), "usr/bin/tool": b"x" * 1000, "opt/a <b>&.txt": b"y"}
    image = put_image(stand[1], make_sif(tmp_path / "deep.sif", files=files), "lab/deep", tags=["v1"])
    page = tab.open(f"/lab/deep/images/{image.id}")
    assert page.locator("svg.treemap").count() == 1
    page.evaluate("window.kept = true")
    page.locator("#files tbody a >> text=usr/").click()
    page.wait_for_selector("#files >> text=What is in /usr")
    page.locator("#files tbody a >> text=lib/").click()
    page.wait_for_selector("#files >> text=195.3 KiB")
    assert page.evaluate("window.kept") is True  # nothing else was loaded again
    assert page.url.endswith("?path=usr%2Flib")
    page.reload()
    assert "What is in /usr/lib" in page.inner_text("#files")
    page.go_back()
    page.wait_for_selector("#files >> text=What is in /usr")


def test_running_builds_refresh_by_themselves(tab: Tab, stand: tuple[Server, Hub]):
    hub = stand[1]
    number = put_build(hub, state="queued", claimed_at=None, finished_at=None, tag="soon")
    page = tab.open("/lab/tools")
    page.wait_for_selector("#newest .state.queued")
    with hub.write() as session:
        session.get_one(Build, number).state = "cancelled"
    wait_for(lambda: page.locator("#newest .state.queued").count() == 0, what="the refresh")


def test_buttons_copy_commands_or_select_them(tab: Tab):
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = tab.open("/lab/tools")
    page.locator(".pull button >> nth=0").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()").startswith("singularity pull")
