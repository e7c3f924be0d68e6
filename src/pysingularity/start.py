# SPDX-License-Identifier: Apache-2.0
"""What the launcher runs; also by hand: `python3 -I -S start.py ARGUMENTS`.

Without `site` and isolated there is no path to this package, and giving one would make every import list a large
site-packages. So the package is made known by hand, with its own folder as the only place to look.
"""

import _signal
import sys

# Starting a container leaves nothing to clean up, so Ctrl-C simply ends this process, without a traceback. Commands
# that have something to tidy take the interpreter's way back (cli.main). A caller that ignores the signal still does.
if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

folder = __file__.rpartition("/")[0] or "."
package = type(sys)("pysingularity")
package.__path__ = [folder]
package.__file__ = folder + "/__init__.py"
sys.modules["pysingularity"] = package

from pysingularity.cli.main import main  # noqa: E402

sys.exit(main())
