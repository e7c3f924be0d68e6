# SPDX-License-Identifier: Apache-2.0
"""One HTTP client for registries, libraries and hubs: pools, proxies, certificates, patience, and careful redirects.

Redirects are followed by hand, so that credentials never travel to another host, port or scheme. What may pass (cuts,
429, 5xx) is tried again with growing, scattered pauses; `Retry-After` is honoured. Who may log in where is `auth`'s
matter; continuing a cut download is `blobs`'.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

import urllib3  # 80 ms: this module is only loaded when something is fetched

from pysingularity.errors import RegistryError
from pysingularity.version import FULL

#: Tries of one request, and the longest pause (seconds) that a server may ask for.
TRIES, LONGEST_PAUSE = 6, 120.0
#: Answers that may be different in a moment.
PASSING = (408, 425, 429, 500, 502, 503, 504)
MOVED = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 10
#: The largest document (manifest, token, JSON) that is read into memory.
MOST_JSON = 8 << 20


class Answer:
    """An answer whose body has not been read yet; `close` gives the connection back."""

    def __init__(self, raw: Any, url: str) -> None:
        self.raw, self.url = raw, url
        self.status: int = raw.status
        self.headers: Mapping[str, str] = raw.headers

    def read(self, limit: int = MOST_JSON) -> bytes:
        """Return the whole body of a document.

        Raises:
            RegistryError: it is larger than any document, or the connection was cut.
        """
        try:
            data: bytes = self.raw.read(limit + 1)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise RegistryError("connection-cut", f"{place(self.url)}: {explain(error)}") from None
        finally:
            self.close()
        if len(data) > limit:
            raise RegistryError("answer-too-large", f"{place(self.url)}: answer of more than {limit} bytes")
        return data

    def pieces(self, size: int) -> Iterator[bytes]:
        """Yield the body; raises urllib3's and the system's errors when the connection is cut."""
        try:
            while data := self.raw.read(size):
                yield data
        finally:
            self.close()

    def json(self) -> Any:
        """Return the body of a JSON document.

        Raises:
            RegistryError: it is none.
        """
        data = self.read()
        try:
            return json.loads(data)
        except ValueError:
            raise RegistryError("bad-answer", f"{place(self.url)}: the answer is no JSON") from None

    def close(self) -> None:
        """Give the connection back; one with an unread rest is closed."""
        self.raw.close()
        self.raw.release_conn()


class Http:
    """A client. Threads may share it.

    Arguments:
        environ: proxies (http_proxy, https_proxy, no_proxy), SSL_CERT_FILE.
        insecure: tells for a host and port whether its certificate need not be checked.
        note: told what is being waited for.
    """

    def __init__(
        self,
        environ: Mapping[str, str],
        *,
        insecure: Callable[[str], bool] = lambda _: False,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._environ, self._insecure, self._note = environ, insecure, note
        self._pools: dict[tuple[str, bool, bool, str], Any] = {}
        self.tries = TRIES

    def _pool(self, url: str) -> Any:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        insecure = secure and self._insecure(parts.netloc)
        proxy = self._proxy(url)
        certificates = (
            parts.netloc if secure and not insecure and _own_certificates(parts.netloc, self._environ) else ""
        )
        key = (proxy, secure, insecure, certificates)
        pool = self._pools.get(key)
        if pool is None:
            options: dict[str, Any] = {
                "timeout": urllib3.Timeout(connect=30, read=60),
                "retries": False,
                "maxsize": 16,
                "headers": {"User-Agent": f"singularity/{FULL}", "Accept-Encoding": "identity"},
            }
            if secure:
                options["ssl_context"] = _context(insecure, certificates, self._environ)
            pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
            self._pools[key] = pool
        return pool

    def _proxy(self, url: str) -> str:
        """Return the proxy for an address, "" for none."""
        parts = urlsplit(url)
        proxies = _proxies(self._environ)
        proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
        return "" if proxy and _left_out(parts.netloc, proxies.get("no", "")) else proxy

    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        body: Any = None,
        redirects: bool = True,
        tries: int | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request and return the answer, whatever its status, after redirects and passing faults.

        Arguments:
            headers: sent everywhere.
            body: bytes, or a file; a file is sent again from its start when a request is repeated.
            redirects: follow them.
            tries: how often passing faults are tried.
            secrets: headers with credentials, sent to the first host only.

        Raises:
            RegistryError: the host cannot be reached.
        """
        start = url
        hops = 0
        while True:
            ours = _origin(url) == _origin(start)
            full = {**self._base(), **(headers or {}), **((secrets or {}) if ours else {})}
            answer = self._patiently(method, url, full, body, tries or self.tries)
            location = answer.headers.get("Location")
            if not redirects or answer.status not in MOVED or not location:
                return answer
            answer.close()
            hops += 1
            if hops > MOST_REDIRECTS:
                raise RegistryError("redirect-loop", f"{place(start)}: more than {MOST_REDIRECTS} redirects")
            new = urljoin(url, location)
            if urlsplit(new).scheme not in ("http", "https"):
                raise RegistryError("bad-redirect", f"{place(start)}: redirected to {new[:80]}")
            if urlsplit(url).scheme == "https" and urlsplit(new).scheme == "http":
                raise RegistryError(
                    "bad-redirect", f"{place(start)}: redirected from https to plain http on {urlsplit(new).netloc}"
                )
            if _origin(new) != _origin(url) and secrets:
                secrets = None  # also when a later redirect leads back: whoever sent us there might want that
            if answer.status == 303 or (answer.status in (301, 302) and method == "POST"):
                method, body = "GET", None
            url = new

    def close(self) -> None:
        """Close all connections."""
        for pool in self._pools.values():
            pool.clear()
        self._pools.clear()

    def _base(self) -> dict[str, str]:
        return {"User-Agent": f"singularity/{FULL}", "Accept-Encoding": "identity"}

    def _patiently(self, method: str, url: str, headers: dict[str, str], body: Any, tries: int) -> Answer:
        for attempt in range(1, tries + 1):
            if hasattr(body, "seek"):
                body.seek(0)
            try:
                raw = self._pool(url).request(
                    method, url, headers=headers, body=body, redirect=False, preload_content=False, decode_content=False
                )
            except (urllib3.exceptions.HTTPError, OSError) as error:
                reason = explain(error)
                proxy = self._proxy(url)
                if proxy and isinstance(error, urllib3.exceptions.ProxyError):
                    reason += f" by the proxy {place(proxy)}"
                # Nobody listening is rarely cured by waiting long.
                if attempt >= (min(tries, 3) if "refused" in reason else tries) or _hopeless(error):
                    raise RegistryError("unreachable", f"{place(url)}: {reason}", hint=_advice(error, url)) from None
                self._pause(attempt, None, f"{place(url)}: {reason}")
                continue
            answer = Answer(raw, url)
            if answer.status not in PASSING or attempt == tries:
                return answer
            wait = answer.headers.get("Retry-After")
            answer.close()
            self._pause(attempt, wait, f"{place(url)} answers {answer.status}")
        raise AssertionError("unreachable")

    def _pause(self, attempt: int, wait: str | None, why: str) -> None:
        seconds = pause(attempt, wait)
        if seconds > 2:
            self._note(f"{why}; trying again in {seconds:.0f} s")
        time.sleep(seconds)


def pause(attempt: int, wait: str | None = None) -> float:
    """Return how long to wait after a failed attempt (1, 2, …): as the server asks, else 0.5 s doubling, ±50 %."""
    if wait:
        wait = wait.strip()
        if wait.isdigit():
            return min(float(wait), LONGEST_PAUSE)
        from email.utils import parsedate_to_datetime

        try:
            return min(max(parsedate_to_datetime(wait).timestamp() - time.time(), 0.0), LONGEST_PAUSE)
        except (ValueError, TypeError):
            pass
    return float(min(0.5 * 2 ** (attempt - 1), 20.0) * random.uniform(0.5, 1.5))


def _proxies(environ: Mapping[str, str]) -> dict[str, str]:
    """Read proxy variables as everybody does: lower case wins, HTTP_PROXY is not trusted inside CGI programs."""
    found: dict[str, str] = {}
    for name, value in environ.items():
        if name.lower().endswith("_proxy") and value and not (name == "HTTP_PROXY" and "REQUEST_METHOD" in environ):
            found.setdefault(name.lower()[:-6], value)
    for name, value in environ.items():
        if name.endswith("_proxy"):
            if value:
                found[name[:-6]] = value
            else:
                found.pop(name[:-6], None)
    return found


def _left_out(netloc: str, without: str) -> bool:
    """Return whether no_proxy says that a host (with port) is asked directly: its name, a domain above it, or `*`."""
    full = netloc.rpartition("@")[2].lower()
    host = full if full.endswith("]") else full.rpartition(":")[0] or full
    for name in without.split(","):
        name = name.strip().lstrip(".").lower()
        if name == "*" or (name and any(one == name or one.endswith("." + name) for one in (host, full))):
            return True
    return False


def _own_certificates(netloc: str, environ: Mapping[str, str]) -> str:
    """Return the folder with certificates for one registry, as Docker and containers keep them."""
    homes = [os.path.join(environ.get("HOME", "/"), ".config/containers/certs.d")]
    for top in (*homes, "/etc/containers/certs.d", "/etc/docker/certs.d"):
        folder = os.path.join(top, netloc)
        if os.path.isdir(folder):
            return folder
    return ""


def _context(insecure: bool, netloc: str, environ: Mapping[str, str]) -> Any:
    import ssl

    # A folder of hashed names is looked into when needed; the system's bundle would take 30 ms to be read.
    places = ssl.get_default_verify_paths()
    hashed = next((one for one in (places.capath, "/etc/ssl/certs") if one and _is_hashed(one)), None)
    context = ssl.create_default_context(cafile=environ.get("SSL_CERT_FILE") or None, capath=hashed)
    if environ.get("SSL_CERT_DIR"):
        context.load_verify_locations(capath=environ["SSL_CERT_DIR"])
    if hashed is None:
        context.load_default_certs()
    folder = _own_certificates(netloc, environ) if netloc else ""
    for name in sorted(os.listdir(folder)) if folder else ():
        path = os.path.join(folder, name)
        if name.endswith(".crt"):
            context.load_verify_locations(path)
        elif name.endswith(".cert") and os.path.exists(path[:-5] + ".key"):
            context.load_cert_chain(path, path[:-5] + ".key")
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _is_hashed(folder: str) -> bool:
    """Return whether a folder of certificates has names by which OpenSSL finds them (c_rehash)."""
    try:
        return any(name.endswith(".0") and len(name) == 10 for name in os.listdir(folder))
    except OSError:
        return False


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def place(url: str) -> str:
    """Return an address for messages: without query (which may hold a signature) and user."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def explain(error: BaseException) -> str:
    """Return the innermost reason of a failed connection in plain words."""
    seen = set()
    while id(error) not in seen:
        seen.add(id(error))
        inner = getattr(error, "reason", None) or error.__cause__
        if isinstance(error, urllib3.exceptions.NameResolutionError):
            return "the host's name is not known"
        if isinstance(inner, BaseException):
            error = inner
    if isinstance(error, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    text = str(error)
    if "ermission" not in text and "refused" in text:
        return "connection refused"
    return (text.rpartition(": ")[2] or type(error).__name__).strip()[:160]


def _hopeless(error: BaseException) -> bool:
    text = repr(error)
    return "CERTIFICATE_VERIFY_FAILED" in text or "WRONG_VERSION_NUMBER" in text or "NameResolutionError" in text


def _advice(error: BaseException, url: str) -> str:
    text = repr(error)
    if "WRONG_VERSION_NUMBER" in text:
        return "the server speaks plain http: use --no-https, or mark it insecure in registries.conf"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return f"put its CA into ~/.config/containers/certs.d/{urlsplit(url).netloc}/ca.crt, or set SSL_CERT_FILE"
    return ""


def refused(answer: Answer, what: str) -> RegistryError:
    """Return the error for an answer that is not what was asked for, in the server's own words where it has some."""
    text = ""
    try:
        value = json.loads(answer.read(1 << 20))
        if isinstance(value, dict):
            errors = value.get("errors")
            if isinstance(errors, list) and errors and isinstance(errors[0], dict):
                text = str(errors[0].get("message") or errors[0].get("code") or "")
            elif isinstance(value.get("error"), dict):
                text = str(value["error"].get("message") or "")
            else:
                text = str(value.get("message") or value.get("details") or "")
    except (ValueError, RegistryError):
        pass
    words = {
        401: ("unauthorized", "it wants a login", "log in with: singularity registry login"),
        403: ("forbidden", "access is denied", "check the name, or log in with: singularity registry login"),
        404: ("not-found", "not found", ""),
        429: ("too-many-requests", "too many requests", "wait, or log in: known users have a higher limit"),
    }
    name, word, hint = words.get(answer.status, ("refused", f"the server answers {answer.status}", ""))
    if answer.status == 429 and answer.headers.get("RateLimit-Limit"):
        word += f" (limit {answer.headers['RateLimit-Limit']}, left {answer.headers.get('RateLimit-Remaining', '?')})"
    clean = "".join(letter for letter in text if letter.isprintable())[:200]
    return RegistryError(name, f"{what}: {word}{': ' + clean if clean else ''}", hint=hint)
