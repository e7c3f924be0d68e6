# SPDX-License-Identifier: Apache-2.0
"""Agents that name an image elsewhere: docker, oci and their archives, library, shub, oras.

The registry room turns a reference into a local image in the cache; from there it is `localimage`'s work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult
from pysingularity.build.bootstrap.localimage import unpack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pysingularity.registry.fetch import Fetched


def reference_text(header: dict[str, str]) -> str:
    """Return the reference that a header names: docker://registry/namespace/name:tag and so on."""
    agent = header.get("bootstrap", "").lower()
    name = header.get("from", "").strip()
    if name.startswith(agent + "://"):
        return name
    if agent == "docker":
        parts = [header.get("registry", "").strip().rstrip("/"), header.get("namespace", "").strip().strip("/"), name]
        return "docker://" + "/".join(part for part in parts if part)
    if agent in ("library", "shub", "oras"):
        return f"{agent}://{name.removeprefix('//')}"
    return f"{agent}:{name}"


def bootstrap(request: BootstrapRequest) -> BootstrapResult:
    """Fetch the image that the header names and unpack it.

    Raises:
        UserError: there is no From. RegistryError: the image cannot be fetched.
    """
    request.need("From", example="debian:12")
    text = reference_text(request.header)
    # Without a cache the image is made in the temporary folder, and goes with it.
    environ = {**request.environ, "SINGULARITY_TMPDIR": request.tmp}
    fetched = _fetch(text, options_of(request.header, request.options), environ, request.progress)
    result = unpack(request, fetched.path)
    result.source = text
    result.digest = fetched.digests.get("top") or fetched.digests.get("manifest") or fetched.digests.get("image", "")
    return result


def options_of(header: Mapping[str, str], options: Mapping[str, object]) -> dict[str, object]:
    """Return the options of a fetch: a header may name its library, that of a Dockerfile's stage an architecture."""
    arch = header.get("platform", "").rpartition("linux/")[2]
    library = header.get("library", "").strip()
    return {**options, **({"arch": arch} if arch else {}), **({"library": library} if library else {})}


def fetch_text(
    text: str, options: Mapping[str, object], environ: Mapping[str, str], progress: Callable[..., None]
) -> str:
    """Return the path of a local image of a reference."""
    return _fetch(text, options, environ, progress).path


def _fetch(
    text: str, options: Mapping[str, object], environ: Mapping[str, str], progress: Callable[..., None]
) -> Fetched:
    from pysingularity.reference import parse_reference
    from pysingularity.registry.fetch import obtain  # the network's modules: only when something is fetched
    from pysingularity.registry.settings import settings_from

    return obtain(parse_reference(text), settings_from({**options, "environ": environ}), progress)
