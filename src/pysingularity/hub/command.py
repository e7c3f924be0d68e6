# SPDX-License-Identifier: Apache-2.0
"""The `singularity-hub` command: options, and one function per command. Results go to standard output.

Every command has `--json`. Commands work on the data folder and its database directly, so they need no running hub and
no token; whoever can read the folder is the administrator.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pysingularity import messages
from pysingularity.errors import SingularityError, UsageError
from pysingularity.version import __version__

Result = dict[str, Any] | list[Any]


def main(words: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        arguments = parser().parse_args(words)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except SingularityError as error:
        messages.fatal(str(error)) if error.exit_code == 255 else messages.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in our own way."""

    def error(self, message: str) -> Any:
        """Refuse a command line."""
        raise UsageError("usage", message, hint=f"see: {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    from pysingularity.hub import administration as admin
    from pysingularity.hub.keeping import commands as keeping

    top = _Parser(prog="singularity-hub", description="Run a Singularity Hub of your own.")
    top.add_argument("--version", action="version", version=f"singularity-hub {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(
        where: Any, name: str, run: Callable[[argparse.Namespace], Result | str | int], text: str
    ) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = where.add_parser(name, help=text, description=text + ".")
        one.add_argument("--data", default=os.environ.get("SINGULARITY_HUB_DATA", "hub"), metavar="DIR")
        one.add_argument("--json", action="store_true", help="print the result as JSON")
        one.set_defaults(run=lambda arguments: _print(run(arguments), arguments))
        return one

    def group(name: str, text: str) -> Any:
        one = commands.add_parser(name, help=text, description=text + ".")
        return one.add_subparsers(dest=name, required=True, metavar="COMMAND", parser_class=_Parser)

    add(commands, "init", admin.init, "Make a hub, or bring an older one up to date")

    one = add(commands, "serve", _serve, "Run the hub: web, webhooks and builds")
    one.add_argument("--host", default=None, help="address to listen on (default 127.0.0.1)")
    one.add_argument("--port", type=int, default=None, help="port to listen on (default 8080)")
    one.add_argument("--url", default=None, metavar="PUBLIC_URL", help="how people reach the hub")

    add(commands, "settings", admin.settings, "Show all settings as they are now")

    users = group("user", "Manage users")
    one = add(users, "add", admin.user_add, "Add a user")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--admin", action="store_true", help="an administrator")
    one.add_argument("--email", default="")
    one.add_argument("--password-stdin", action="store_true", help="read the password from standard input")
    add(users, "list", admin.user_list, "List users")
    one = add(users, "password", admin.user_password, "Give a user another password, from standard input")
    one.add_argument("name", metavar="NAME")
    one.add_argument("--password-stdin", action="store_true", help="(always so; for symmetry)")
    for name, what in (("block", "Block a user: nothing of his works any more"), ("unblock", "Let a user in again")):
        one = add(users, name, admin.user_block, what)
        one.add_argument("name", metavar="NAME")
        one.set_defaults(block=name == "block")

    tokens = group("token", "Manage tokens")
    one = add(tokens, "create", admin.token_create, "Make a token and print it, once")
    one.add_argument("--user", required=True, metavar="NAME")
    one.add_argument("--scope", default="read", metavar="read,push,build,admin")
    one.add_argument("--expires", type=float, default=None, metavar="DAYS")
    one.add_argument("--name", default="")
    one.add_argument("--collection", default="", metavar="OWNER/NAME", help="for this collection only")
    one = add(tokens, "list", admin.token_list, "List tokens")
    one.add_argument("--user", default="", metavar="NAME")
    one = add(tokens, "revoke", admin.token_revoke, "Take a token back")
    one.add_argument("id", type=int)

    collections = group("collection", "Manage collections")
    one = add(collections, "add", admin.collection_add, "Connect a git repository")
    one.add_argument("name", metavar="OWNER/NAME")
    one.add_argument("--git", default="", metavar="URL")
    one.add_argument("--branch", action="append", default=[], metavar="B", help="branch that builds (several allowed)")
    one.add_argument("--private", action="store_true")
    one.add_argument("--poll", type=float, default=0.0, metavar="SECONDS", help="look at the repository so often")
    one.add_argument("--description", default="")
    add(collections, "list", admin.collection_list, "List collections")
    one = add(collections, "show", admin.collection_show, "Show a collection with its webhook")
    one.add_argument("name", metavar="OWNER/NAME")
    one = add(collections, "remove", admin.collection_remove, "Remove a collection and its images")
    one.add_argument("name", metavar="OWNER/NAME")
    one.add_argument("--force", action="store_true", help="even when images are frozen")

    one = add(commands, "build", admin.build, "Queue a build of a recipe")
    one.add_argument("name", metavar="OWNER/NAME")
    one.add_argument("--recipe", default="", metavar="PATH")
    one.add_argument("--tag", default="")
    one.add_argument("--ref", default="", help="branch, tag or commit")

    one = add(commands, "gc", keeping.gc, "Remove old images by the rules of retention, and files that nothing needs")
    one.add_argument("--grace", type=float, default=None, metavar="SECONDS", help="how long unneeded files stay")
    one.add_argument("--dry-run", action="store_true", help="only say what would go")

    one = add(commands, "scrub", keeping.scrub, "Read stored files again and stop serving damaged ones")
    one.add_argument("--older", type=float, default=0.0, metavar="DAYS", help="only those not read for so long")
    one.add_argument("--most", type=int, default=0, metavar="COUNT", help="no more than so many")

    one = add(commands, "backup", keeping.back_up, "Write a backup of the running hub into a folder")
    one.add_argument("target", metavar="FOLDER")
    one = add(commands, "restore", keeping.restore, "Make a hub of a backup")
    one.add_argument("source", metavar="FOLDER")

    one = add(commands, "export", keeping.export, "Write plain files that answer shub:// from any file server")
    one.add_argument("target", metavar="FOLDER")
    one.add_argument("--url", required=True, metavar="URL", help="where the folder will be served")
    one.add_argument("name", nargs="*", metavar="OWNER/NAME", help="collections; all public ones when none is named")

    add(commands, "doctor", admin.doctor, "Check that everything the hub needs is there")
    return top


def _serve(arguments: argparse.Namespace) -> int:
    from pysingularity.hub.context import Hub
    from pysingularity.hub.serve import serve
    from pysingularity.hub.settings import load_settings

    folder = Path(arguments.data)
    if not folder.exists() or not any(folder.iterdir()):  # a folder with something else in it is not ours to fill
        from pysingularity.hub.administration import init

        messages.info(str(init(arguments)["_alone"]))
        messages.info(f"make an administrator: singularity-hub user add NAME --admin --password-stdin --data {folder}")
    names = ("host", "port", "url")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    settings = load_settings(arguments.data, **given)
    hub = Hub(settings)
    try:
        hub.database.check()
    finally:
        hub.close()
    words = [str(settings.data), settings.host, str(settings.port), settings.url]
    return serve(settings, words, as_json=arguments.json)


def _print(result: Result | str | int, arguments: argparse.Namespace) -> int:
    """Print a result: JSON when asked for (collections' secrets always), else lines for people."""
    if isinstance(result, int):
        return result
    if isinstance(result, str):
        print(json.dumps({"result": result}) if arguments.json else result)
        return 0
    status = int(result.pop("_status", 0)) if isinstance(result, dict) else 0
    alone = result.pop("_alone", None) if isinstance(result, dict) else None
    always = bool(result.pop("_json", False)) if isinstance(result, dict) else False
    if arguments.json or always:
        print(json.dumps(result, indent=2))
    elif alone is not None:
        print(alone)
    elif isinstance(result, list):
        for row in result:
            print("\t".join(str(value) for value in row.values()))
    else:
        for name, value in result.items():
            print(f"{name}: {value}")
    return status


if __name__ == "__main__":
    sys.exit(main())
