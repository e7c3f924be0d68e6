# SPDX-License-Identifier: Apache-2.0
"""Which certificates %post gets."""

from __future__ import annotations

import pytest

from pysingularity.build import trust
from pysingularity.errors import UserError


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    path = tmp_path / "host.pem"
    path.write_text("x")
    monkeypatch.setattr(trust, "BUNDLES", (str(path),))
    return str(path)


def test_auto_takes_the_callers_bundle_else_the_hosts_where_the_image_has_none(bundle, tmp_path):
    (tmp_path / "site.pem").write_text("y")
    site = str(tmp_path / "site.pem")
    assert trust.find("auto", {"CURL_CA_BUNDLE": site}, True) == site
    assert trust.find("auto", {}, False) == bundle
    assert trust.find("auto", {}, True) == ""
    assert trust.find("auto", {"SSL_CERT_FILE": "/nosuch"}, True) == ""


def test_the_other_words(bundle):
    assert trust.find("host", {}, True) == bundle
    assert trust.find("no", {"SSL_CERT_FILE": bundle}, False) == ""
    assert trust.find(bundle, {}, True) == bundle
    with pytest.raises(UserError, match="/nosuch"):
        trust.find("/nosuch", {}, False)


def test_every_usual_client_is_told():
    assert {"SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"} <= set(
        trust.variables("/x")
    )
    assert "/x" in trust.apt_settings("/x") and "/x" in trust.wget_settings("/x")
