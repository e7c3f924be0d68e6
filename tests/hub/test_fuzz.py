# SPDX-License-Identifier: Apache-2.0
"""Whatever is sent to the API is answered as its description says; and references of any kind are never a surprise."""

from __future__ import annotations

import shutil
import sys
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pysingularity.hub.catalog import parse_target
from pysingularity.hub.context import Hub
from pysingularity.hub.errors import HubError
from pysingularity.hub.storage.files import FileStorage

from .shelf import make_sif, put_image, run
from .test_pages import put_build
from .world import Server


@pytest.fixture
def server(clean: tuple[Server, Hub]) -> Server:
    return clean[0]


@pytest.fixture
def hub(clean: tuple[Server, Hub]) -> Hub:
    return clean[1]


@pytest.mark.long
def test_api_answers_as_it_is_described(server: Server, hub: Hub, tmp_path: Path):
    program = Path(sys.executable).with_name("st")
    if not program.exists() and shutil.which("st") is None:
        pytest.skip("needs schemathesis: pip install schemathesis")
    put_image(hub, make_sif(tmp_path / "a.sif", "one"), "lab/tools", tags=["latest"])
    put_image(hub, make_sif(tmp_path / "b.sif", "two"), "lab/tools", tags=["2"])
    put_build(hub, log=b"==> A\nline\n")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    result = run(
        program,
        "run",
        f"{server.url}/api/v1/openapi.json",
        *("--header", f"Authorization: Bearer {server.token}"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--checks", checks),
        *("--continue-on-failure", "--no-color", "--workers", "2"),
        # What would take the token away, with which all the rest is asked.
        *("--exclude-path-regex", r"/tokens/\{number\}$|/users/\{name\}$|/user/sign-ins$"),
        *("--exclude-path", "/api/v1/user"),
        cwd=tmp_path,
        timeout=540,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert server.get("/api/v1/user").status == 200


PIECE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["..", ".", "lab", "tools", "%2e%2e", "\0", "a" * 70, "-x", "ä", "latest", "LAB"]
)


@given(owner=PIECE, name=PIECE, tag=PIECE, digest=PIECE)
def test_any_reference_is_parsed_or_refused(owner: str, name: str, tag: str, digest: str):
    for text in (
        f"{owner}/{name}",
        f"{owner}/{name}:{tag}",
        f"{owner}/{name}@{digest}",
        f"{owner}/{name}:{tag}@{digest}",
    ):
        try:
            found = parse_target(text)
        except HubError as error:
            assert error.status == 400
            continue
        assert found.owner == found.owner.lower()
        for part in (found.owner, found.name):
            assert part not in ("", ".", "..")
            assert "/" not in part
            assert part.isascii()


@given(digest=st.text(max_size=70))
def test_no_digest_names_a_file_outside_the_store(digest: str):
    storage = FileStorage(Path("/nowhere"))
    try:
        path = storage.path(digest)
    except HubError:
        return
    assert path.parent.parent == Path("/nowhere")
    assert len(path.name) == 64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(target=st.lists(PIECE, min_size=1, max_size=4), door=st.sampled_from(range(7)))
def test_no_name_breaks_a_door(server: Server, target: list[str], door: int):
    name = urllib.parse.quote("/".join(target), safe="/:@%")
    path = (
        f"/api/container/{name}",
        f"/v1/images/{name}",
        f"/v1/imagefile/{name}",
        f"/v2/{name}/manifests/latest",
        f"/v2/{name}/tags/list",
        f"/api/v1/images/{name}",
        f"/{name}",
    )[door]
    answer = server.get(path)
    assert answer.status < 500, path
