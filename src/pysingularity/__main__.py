# SPDX-License-Identifier: Apache-2.0
"""`python -m pysingularity`: the plain way to start the `singularity` command."""

import sys

from pysingularity.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
