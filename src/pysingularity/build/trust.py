# SPDX-License-Identifier: Apache-2.0
"""The host's certificate authorities for %post: found on the host, bound to a private path, named by variables.

Sites behind a private certificate authority need it for every download a %post makes (apt, pip, conda, curl, wget, git,
node). The bundle is never written into the image: it is bound while %post runs, and gone afterwards.

The setting (option --ca-bundle, variable SINGULARITY_BUILD_CA_BUNDLE, `build ca bundle` in the configuration) is

    auto   the bundle that the caller's own environment names (SSL_CERT_FILE, CURL_CA_BUNDLE, REQUESTS_CA_BUNDLE);
           without one the host's, when the image has no certificates of its own; otherwise none. This is the default
    host   the host's bundle, always
    no     none
    FILE   this file
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from pysingularity.errors import UserError

#: Where distributions keep one file with all certificates (Debian, Fedora, SUSE, Alpine, FreeBSD's name).
BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
#: Variables that programs read the path of a bundle from: OpenSSL and Python, pip, requests and conda, curl, git, node,
#: cargo, nix, the AWS tools.
VARIABLES = (
    "SSL_CERT_FILE",
    "PIP_CERT",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "CARGO_HTTP_CAINFO",
    "NIX_SSL_CERT_FILE",
    "AWS_CA_BUNDLE",
)
#: Variables of the caller that tell that this site has a bundle of its own.
_NAMED = ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")


def find(setting: str, environ: Mapping[str, str], image_has_its_own: bool) -> str:
    """Return the path of the host's bundle to be used, or "" for none.

    Arguments:
        setting: auto, host, no or a path.
        environ: the caller's environment.
        image_has_its_own: the root file system holds one of BUNDLES.

    Raises:
        UserError: the file that was asked for is not there.
    """
    word = setting.strip()
    if word.lower() in ("no", "none", "off", "false"):
        return ""
    host = next((path for path in BUNDLES if os.path.isfile(path)), "")
    if word.lower() == "host":
        if not host:
            raise UserError("no-ca-bundle", "this machine has no bundle of certificate authorities", hint="name a file")
        return host
    if word and word.lower() != "auto":
        if not os.path.isfile(word):
            raise UserError("no-ca-bundle", f"{word}: there is no such file of certificates")
        return os.path.abspath(word)
    for name in _NAMED:
        path = environ.get(name, "")
        if path and os.path.isfile(path):
            return os.path.abspath(path)
    return "" if image_has_its_own else host


def variables(path: str) -> dict[str, str]:
    """Return the variables that make programs trust the bundle at `path` (inside the container)."""
    return dict.fromkeys(VARIABLES, path)


def wget_settings(path: str) -> str:
    """Return a wgetrc that names the bundle; wget knows no variable for it, and curl's is not read."""
    return f"ca_certificate = {path}\n"


def apt_settings(path: str) -> str:
    """Return apt configuration that names the bundle: apt reads no variable for it either."""
    return f'Acquire::https::CaInfo "{path}";\n'
