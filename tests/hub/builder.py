#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `singularity build` and `test`: the same events, a real SIF, and %post run by the shell where it is.

It builds no operating system; what it makes is a SIF with the definition, metadata and a squashfs of one file, so that
the hub's part (queue, sandbox, log, acceptance) can be tested in a second.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time

from pysingularity.events import Event
from pysingularity.recipe.parser import parse
from pysingularity.recipe.sections import file_pairs, labels
from pysingularity.sif import layout
from pysingularity.sif.file import SifObject, create, random_identity


def say(kind: str, **fields: object) -> None:
    print(Event(kind, fields).line(), flush=True)


def run(step: int, script: str) -> int:
    child = subprocess.Popen(
        ["/bin/sh", "-e", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    )
    assert child.stdout is not None
    for line in child.stdout:
        say("log", step=step, text=line.decode("utf-8", "replace"))
    return child.wait()


def build(image: str, recipe: str) -> int:
    with open(recipe, "rb") as file:
        text = file.read()
    stage = parse(text, recipe).stages[-1]
    say("plan", steps=[{"number": 1, "kind": "post", "title": "Running %post", "id": "0"}])
    say("start", step=1, title="Copying files")
    with tempfile.TemporaryDirectory() as folder:
        for pair in file_pairs(stage, recipe):
            with open(pair.source, "rb") as source, open(os.path.join(folder, "copied"), "ab") as target:
                target.write(source.read())
        say("end", step=1, status="done", seconds=0.0)
        say("start", step=2, title="Running %post")
        status = run(2, stage.body("post"))
        if status == 183:
            return 183
        if status:
            say("end", step=2, status="failed", seconds=0.0)
            say("failed", id="post-failed", message=f"%post ended with status {status}", hint="look at the log")
            return 255
        say("end", step=2, status="done", seconds=0.0)
        with open(os.path.join(folder, "stamp"), "w") as file:
            file.write(f"{recipe} {time.time()}\n")
        squashfs = os.path.join(tempfile.gettempdir(), f"root-{os.getpid()}.squashfs")
        subprocess.run(["mksquashfs", folder, squashfs, "-quiet", "-no-progress", "-noappend"], check=True, stdout=2)
    import json

    attributes = {
        "deffile": text.decode("utf-8", "replace"),
        "labels": labels(stage.body("labels")),
        "test": stage.body("test"),
        "runscript": stage.body("runscript"),
        "environment": {"/.singularity.d/env/90-environment.sh": stage.body("environment")},
    }
    document = {"data": {"attributes": attributes}, "type": "container"}
    fd = os.open(squashfs, os.O_RDONLY)
    extra = layout.partition_extra(layout.SQUASHFS, layout.PRIMARY, "amd64")
    target = os.open(image, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o755)
    create(
        target,
        [
            SifObject(layout.DEFINITION, text),
            SifObject(layout.JSON, json.dumps(document).encode(), name="inspect-metadata.json"),
            SifObject(layout.PARTITION, fd=fd, extra=extra),
        ],
        identity=random_identity(),
        when=int(time.time()),
    )
    os.unlink(squashfs)
    say("result", path=image, size=os.path.getsize(image), seconds=0.1)
    return 0


def test(image: str) -> int:
    with open(image, "rb") as file:
        text = file.read(1 << 20)
    match = re.search(rb"%test\n((?:    [^\n]*\n)*)", text)
    return subprocess.run(["/bin/sh", "-e", "-c", match[1].decode()]).returncode if match else 0


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    sys.exit(build(*words[1:]) if words[0] == "build" else test(words[1]))
