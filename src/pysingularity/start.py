# SPDX-License-Identifier: Apache-2.0
"""What the launcher runs, as a file: `python3 -I -S start.py ARGUMENTS`.

Without `site` and isolated there is no path to this package, and giving one would make every import list a large
site-packages. So the package is made known by hand, with its own folder as the only place to look.
"""

import sys

folder = __file__.rpartition("/")[0] or "."
package = type(sys)("pysingularity")
package.__path__ = [folder]
package.__file__ = folder + "/__init__.py"
sys.modules["pysingularity"] = package

from pysingularity.cli.main import main  # noqa: E402

sys.exit(main())
