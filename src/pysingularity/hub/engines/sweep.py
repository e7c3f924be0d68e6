# SPDX-License-Identifier: Apache-2.0
"""Remove a folder whose files belong to a sandbox's ids: run as `python -m pysingularity.hub.engines.sweep FOLDER`.

Only an ordinary user with subordinate ids needs it: he becomes the root of those ids once more, and removes.
"""

from __future__ import annotations

import os
import shutil
import sys

from pysingularity.hub.engines.sandbox import enter_ids


def main(words: list[str]) -> int:
    """Remove words[0]."""
    if not os.path.isabs(words[0]):
        return 2
    enter_ids()
    for top, folders, _ in os.walk(words[0]):
        for name in folders:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(words[0], ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
