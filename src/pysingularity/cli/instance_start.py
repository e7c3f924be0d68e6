# SPDX-License-Identifier: Apache-2.0
"""`singularity instance start`: a container with its startscript that goes on in the background."""

from __future__ import annotations

import os

from pysingularity import messages
from pysingularity.cli import shared
from pysingularity.cli.options import TEXT, Arguments, Option
from pysingularity.errors import UsageError, UserError

USAGE = "IMAGE NAME [ARGUMENT...]"
COUNT = (2, None)
PAYLOAD = True
OPTIONS = (
    Option("pid-file", "Write the instance's process id into FILE", kind=TEXT, metavar="FILE", env=("PID_FILE",)),
    *shared.OPTIONS,
)
HELP = """
The instance has its own processes and ends with `singularity instance stop NAME`. What it prints is kept:
`singularity instance logs NAME`. Join it with instance://NAME in exec, run and shell.
"""


def run(arguments: Arguments, environ: dict[str, str]) -> int:
    """Start the instance and its startscript."""
    return launch("start", arguments, environ)


def launch(action: str, arguments: Arguments, environ: dict[str, str]) -> int:
    """Start an instance that does `action` ("start" or "run")."""
    from pysingularity.runtime.instances import check_name, start
    from pysingularity.runtime.prepare import prepare

    image, name, *words = arguments.positional
    check_name(name)
    shared.refuse(arguments)
    if image.startswith("instance://"):
        raise UsageError("instance-of-instance", "an instance is started from an image, not from another instance")
    arguments.pid = arguments.ipc = True
    arguments.instance_name = name
    path = shared.local_image(image, arguments, environ)
    spec = prepare(action, path, words, arguments, environ)
    if spec.before_start is not None:  # in this process: it may have to start the command again
        spec.before_start()
        spec.before_start = None
    instance = start(spec, name, environ, image=os.path.abspath(path), command=action)
    if arguments.pid_file:
        try:
            with open(str(arguments.pid_file), "w") as file:
                file.write(f"{instance.pid}\n")
        except OSError as error:
            raise UserError("no-pid-file", f"--pid-file {arguments.pid_file}: {error.strerror}") from None
    messages.info(f"instance {name} started (PID={instance.pid})")
    return 0
