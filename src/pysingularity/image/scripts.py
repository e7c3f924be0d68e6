# SPDX-License-Identifier: Apache-2.0
"""The shell scripts that every image carries below `/.singularity.d`, and how values are written into shell scripts.

The env scripts are sourced in the order of their names before anything runs; the action scripts do that and then start
what was asked for. Our runtime has its own way of doing the same; the scripts are there for runtimes of other makers
(Singularity 2.x and 3.x run them) and for people who enter an image by other means. POSIX sh only: an image may have
nothing better. Which files there are is `image.metadata`.
"""

from __future__ import annotations

HEAD = "#!/bin/sh\n"

SOURCE_ENVIRONMENT = """\
for script in /.singularity.d/env/*.sh; do
    if [ -f "$script" ]; then
        . "$script"
    fi
done
"""

ACTION_EXEC = f"""\
{HEAD}# Set the environment up and become a program.
{SOURCE_ENVIRONMENT}
exec "$@"
"""

ACTION_RUN = f"""\
{HEAD}# Set the environment up and become the runscript of the image, or of one app.
{SOURCE_ENVIRONMENT}
app="${{SINGULARITY_APPNAME:-${{APPTAINER_APPNAME:-}}}}"
if [ -n "$app" ]; then
    if [ -x "/scif/apps/$app/scif/runscript" ]; then
        exec "/scif/apps/$app/scif/runscript" "$@"
    fi
    echo "No runscript for contained app: $app" >&2
    exit 1
fi
if [ -x /.singularity.d/runscript ]; then
    exec /.singularity.d/runscript "$@"
fi
exec /bin/sh "$@"
"""

ACTION_SHELL = f"""\
{HEAD}# Set the environment up and become an interactive shell.
{SOURCE_ENVIRONMENT}
if [ -n "${{SINGULARITY_SHELL:-}}" ] && [ -x "$SINGULARITY_SHELL" ]; then
    exec "$SINGULARITY_SHELL" "$@"
fi
if [ -x /bin/bash ]; then
    SHELL=/bin/bash
    export SHELL
    exec /bin/bash --norc "$@"
fi
SHELL=/bin/sh
export SHELL
exec /bin/sh "$@"
"""

ACTION_START = f"""\
{HEAD}# Set the environment up and become the startscript of an instance.
# Singularity 3 waits for this signal before it calls an instance started; elsewhere it does nothing.
kill -CONT 1 2>/dev/null || :
{SOURCE_ENVIRONMENT}
if [ -x /.singularity.d/startscript ]; then
    exec /.singularity.d/startscript "$@"
fi
"""

ACTION_TEST = f"""\
{HEAD}# Set the environment up and become the test of the image, or of one app.
{SOURCE_ENVIRONMENT}
app="${{SINGULARITY_APPNAME:-${{APPTAINER_APPNAME:-}}}}"
if [ -n "$app" ]; then
    if [ -x "/scif/apps/$app/scif/test" ]; then
        exec "/scif/apps/$app/scif/test" "$@"
    fi
    echo "No tests for contained app: $app" >&2
    exit 1
fi
if [ -x /.singularity.d/test ]; then
    exec /.singularity.d/test "$@"
fi
echo "No test found in container" >&2
exit 0
"""

ENV_BASE = f"{HEAD}# The first script of the environment; it has nothing to set.\n"

ENV_CUSTOM = f"{HEAD}# What %environment says.\n"

ENV_APPS = f"""\
{HEAD}# Switch to the app that was asked for (SCIF).
if [ -z "${{SINGULARITY_APPNAME:-}}" ] && [ -n "${{APPTAINER_APPNAME:-}}" ]; then
    SINGULARITY_APPNAME="$APPTAINER_APPNAME"
fi
if [ -n "${{SINGULARITY_APPNAME:-}}" ]; then
    export SINGULARITY_APPNAME
    if [ ! -d "/scif/apps/$SINGULARITY_APPNAME" ]; then
        echo "Could not locate the container application: $SINGULARITY_APPNAME" >&2
        exit 1
    fi
    SCIF_APPS=/scif/apps
    SCIF_APPROOT="/scif/apps/$SINGULARITY_APPNAME"
    export SCIF_APPS SCIF_APPROOT
    PATH="$SCIF_APPROOT:$PATH"
    if [ -d "$SCIF_APPROOT/bin" ]; then
        PATH="$SCIF_APPROOT/bin:$PATH"
    fi
    export PATH
    if [ -d "$SCIF_APPROOT/lib" ]; then
        LD_LIBRARY_PATH="$SCIF_APPROOT/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
        export LD_LIBRARY_PATH
    fi
    if [ -f "$SCIF_APPROOT/scif/env/01-base.sh" ]; then
        . "$SCIF_APPROOT/scif/env/01-base.sh"
    fi
    if [ -f "$SCIF_APPROOT/scif/env/90-environment.sh" ]; then
        . "$SCIF_APPROOT/scif/env/90-environment.sh"
    fi
fi
"""

ENV_LIBRARIES = f"""\
{HEAD}# Libraries that the runtime binds into the container (GPU drivers) come last; a prompt for shells.
LD_LIBRARY_PATH="${{LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}}/.singularity.d/libs"
PS1="${{PS1:-Singularity> }}"
export LD_LIBRARY_PATH PS1
"""

ENV_RUNTIME = f"""\
{HEAD}# What the caller wants added to PATH, or PATH to be: variables that the runtime sets.
if [ -n "${{SING_USER_DEFINED_PREPEND_PATH:-}}" ]; then
    PATH="$SING_USER_DEFINED_PREPEND_PATH:$PATH"
fi
if [ -n "${{SING_USER_DEFINED_APPEND_PATH:-}}" ]; then
    PATH="$PATH:$SING_USER_DEFINED_APPEND_PATH"
fi
if [ -n "${{SING_USER_DEFINED_PATH:-}}" ]; then
    PATH="$SING_USER_DEFINED_PATH"
fi
unset SING_USER_DEFINED_PREPEND_PATH SING_USER_DEFINED_APPEND_PATH SING_USER_DEFINED_PATH
export PATH
"""


def quote(text: str) -> str:
    """Return `text` as one word of a shell script, whatever is in it."""
    return "'" + text.replace("'", "'\\''") + "'"


def is_name(text: str) -> bool:
    """Return whether a shell can hold a variable of this name."""
    return text.isascii() and text.replace("_", "a").isalnum() and not text[:1].isdigit()


def docker_environment(variables: list[str]) -> str:
    """Return the script that sets the ENV of an OCI image.

    A variable that is set already keeps its value, except PATH, so that values injected by older runtimes win. Names
    that no shell accepts are left out.

    Arguments:
        variables: NAME=VALUE as in the image's configuration; a later one of the same name wins.
    """
    lines = [HEAD + "# ENV of the image this one was made from.\n"]
    chosen: dict[str, str] = {}
    for variable in variables:
        name, _, value = variable.partition("=")
        if is_name(name):
            chosen[name] = value
    for name, value in chosen.items():
        guard = "" if name == "PATH" else f'[ -n "${{{name}:-}}" ] || '
        lines.append(f"{guard}{name}={quote(value)}\nexport {name}\n")
    return "".join(lines)


def oci_runscript(entrypoint: list[str], command: list[str]) -> str:
    """Return the runscript that starts what an OCI image starts: ENTRYPOINT, then the arguments or else CMD.

    Words are passed on as they are, never evaluated by the shell a second time.
    """
    start = " ".join(quote(word) for word in entrypoint)
    default = " ".join(quote(word) for word in command)
    head = HEAD + "# ENTRYPOINT and CMD of the image this one was made from.\n"
    if not command and start:
        return f'{head}exec {start} "$@"\n'
    with_arguments = f'exec {start} "$@"' if start else 'exec "$@"'
    without = f"exec {start} {default}".replace("  ", " ", 1) if command else "exec /bin/sh"
    return f'{head}if [ "$#" -gt 0 ]; then\n    {with_arguments}\nfi\n{without}\n'


def section_script(body: str, arguments: str = "") -> str:
    """Return the script of a section (%runscript, %startscript, %test).

    Arguments:
        body: the section's lines; a first line `#!…` of its own stays the first line.
        arguments: the words behind the section's name; they go on the line that names the shell.
    """
    if body.startswith("#!"):
        return body if body.endswith("\n") else body + "\n"
    words = f" {arguments.strip()}" if arguments.strip() else ""
    text = f"#!/bin/sh{words}\n\n{body}"
    return text if text.endswith("\n") else text + "\n"


def append_environment(existing: str, body: str) -> str:
    """Return `90-environment.sh` with the lines of one more %environment behind what is there."""
    text = existing or ENV_CUSTOM
    if not text.endswith("\n"):
        text += "\n"
    return f"{text}\n{body}" if body.endswith("\n") else f"{text}\n{body}\n"
