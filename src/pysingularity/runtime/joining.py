# SPDX-License-Identifier: Apache-2.0
"""Running something in an instance: join its namespaces, then start the program as a child in its pid namespace.

Everything is imported before the instance's root is entered. Start ring (for `instance://` only).
"""

from __future__ import annotations

import posix

from pysingularity import messages
from pysingularity.errors import SingularityError
from pysingularity.linux.process import SIGKILL, die_with_parent, leave_like
from pysingularity.runtime.enter import become
from pysingularity.runtime.instances import Instance, join
from pysingularity.runtime.supervise import attend, block_signals, restore_mask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from pysingularity.runtime.spec import LaunchSpec


def enter_instance(instance: Instance, spec: LaunchSpec) -> NoReturn:
    """Run the program of `spec` in an instance, and end as it does.

    Raises:
        SingularityError: the instance cannot be joined.
    """
    mask = block_signals()
    join(instance)
    # A pid namespace holds for children only, so this process stays outside and waits.
    child = posix.fork()
    if child == 0:
        try:
            die_with_parent(SIGKILL)
            restore_mask(mask)
            become(spec)
        except SingularityError as error:
            messages.fatal(str(error))
        except KeyboardInterrupt:
            pass
        posix._exit(255)
    status = attend(child)
    restore_mask(mask)
    posix._exit(leave_like(status))
