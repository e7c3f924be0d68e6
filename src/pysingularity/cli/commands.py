# SPDX-License-Identifier: Apache-2.0
"""The table of commands: name, the module that holds it, one line of help. Start ring: imports nothing.

A command module defines OPTIONS (a tuple of `Option`), USAGE (the words behind the command's name), optionally PAYLOAD
(True: options end at the first positional), HELP (a paragraph and examples), and `run(arguments, environ) -> int`.
A command with sub-commands defines SUBCOMMANDS, a table of the same shape as COMMANDS, instead of `run`.
"""

from __future__ import annotations

#: name → (module below pysingularity.cli, group, summary)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "build": ("build", "Images", "Build an image from a definition file, an image or a reference"),
    "pull": ("pull", "Images", "Pull an image from a registry, library or hub into one file"),
    "push": ("push", "Images", "Push an image file to a registry or library"),
    "convert": ("convert", "Images", "Convert an image of any kind into another kind"),
    "inspect": ("inspect", "Images", "Show the metadata of an image"),
    "overlay": ("overlay", "Images", "Create file systems that keep the changes of containers"),
    "recipe": ("recipe", "Images", "Show, check and write definition files"),
    "sif": ("sif", "Images", "Look into and change a SIF file"),
    "exec": ("exec", "Run", "Run a command within a container"),
    "run": ("run", "Run", "Run the program that the container was made for"),
    "run-help": ("run_help", "Run", "Show the help text of a container"),
    "shell": ("shell", "Run", "Open a shell within a container"),
    "test": ("test", "Run", "Run the tests that were defined for a container"),
    "instance": ("instance", "Run", "Start, join and stop services in containers"),
    "cache": ("cache", "Manage", "List and clean the cache of images and layers"),
    "registry": ("registry", "Manage", "Log in to and out of registries"),
    "rm": ("rm", "Manage", "Remove a sandbox, also one whose files belong to subordinate ids"),
    "doctor": ("doctor", "Manage", "Tell what works on this machine, and what to do about the rest"),
    "completion": ("completion", "Manage", "Print a script that completes command lines"),
    "version": ("version", "Manage", "Show the version"),
    "help": ("help", "Manage", "Show help for a command"),
}
