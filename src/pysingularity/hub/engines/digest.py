# SPDX-License-Identifier: Apache-2.0
"""What a reference means at its registry now: `python -m pysingularity.hub.engines.digest --json REFERENCE`.

Runs in a sandbox, because recipes name the registry; answers with a builder's `result` event, as a build that begins
with the reference would.
"""

from __future__ import annotations

import os
import sys

from pysingularity import thirdparty
from pysingularity.errors import SingularityError
from pysingularity.events import Event
from pysingularity.reference import parse_reference


def digest_of(text: str) -> str:
    """Return the digest of a reference: of a registry's manifest or index, or of the image file ("" when unknown).

    Raises:
        SingularityError: it cannot be asked for.
    """
    thirdparty.enable()
    from pysingularity.registry import library, oci, oras, shub  # after the packages are found
    from pysingularity.registry.settings import settings_from

    reference, settings = parse_reference(text), settings_from({"environ": dict(os.environ)})
    if reference.scheme == "docker":
        if reference.digest:
            return reference.digest
        repository = oci.Repository(reference, settings)
        return repository.digest_of_tag(reference.tag) or repository.manifest(reference.tag).digest
    ask = {"library": library.look_up, "oras": oras.look_up, "shub": shub.look_up}.get(reference.scheme)
    found = ask(reference, settings, lambda _: None) if ask is not None else None
    return f"sha256:{found.sha256}" if found is not None and found.sha256 else ""


def main(words: list[str]) -> int:
    """Print the digest of the last word."""
    try:
        digest = digest_of(words[-1])
    except SingularityError as error:
        print(Event("failed", {"id": error.id, "message": str(error), "hint": error.hint}).line())
        return 1
    print(Event("result", {"bases": [{"uri": words[-1], "digest": digest}]}).line())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
