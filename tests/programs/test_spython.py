# SPDX-License-Identifier: Apache-2.0
"""spython, the Python client of Singularity: it reads our version, our output and our JSON."""

from __future__ import annotations

import json

import pytest

pytestmark = [pytest.mark.long, pytest.mark.network, pytest.mark.rootless, pytest.mark.fuse]

SCRIPT = """
import json, sys
from spython.main import Client
from spython.utils import check_install, get_singularity_version
image, folder, made = sys.argv[1:]
told = {"installed": check_install(), "version": get_singularity_version()}
told["execute"] = Client.execute(image, ["echo", "hello"])
told["status"] = Client.execute(image, ["sh", "-c", "echo out; exit 3"], return_result=True)
told["run"] = Client.run(image, ["echo", "a b"], quiet=True)
told["options"] = Client.execute(image, ["sh", "-c", "echo $A"], options=["--cleanenv", "--env", "A=1"])
told["inspect"] = Client.inspect(image, quiet=True)
instance = Client.instance(image, name="spython", quiet=True)
told["instances"] = [str(one) for one in Client.instances(quiet=True)]
told["inside"] = Client.execute(instance, ["echo", "inside"])
instance.stop(quiet=True)
told["after"] = [str(one) for one in Client.instances(quiet=True)]
told["built"] = Client.build(recipe=folder, image=made, sudo=False, quiet=True)
with open("told.json", "w") as file:
    json.dump(told, file)
"""


def test_client_runs_inspects_and_builds(programs, as_user, sif, box):
    script = as_user.write("script.py", SCRIPT)
    configuration = {"SINGULARITY_CONFIGDIR": str(as_user.tmp / "configuration")}
    made = as_user.tmp / "made.sif"
    as_user([programs / "python", script, sif, box, made], env=configuration, check=True)
    told = json.loads((as_user.tmp / "told.json").read_text())
    assert told["installed"] is True
    assert told["version"].startswith("singularity version ")
    assert told["execute"] == "hello\n"
    assert told["status"] == {"message": "out\n", "return_code": 3}
    assert told["run"].strip() == "a b"
    assert told["options"] == "1\n"
    assert 'exec "$@"' in told["inspect"]["attributes"]["runscript"]
    assert told["instances"] == ["instance://spython"]
    assert told["inside"] == "inside\n"
    assert told["after"] == []
    assert told["built"] == str(made)
    assert made.read_bytes().startswith(b"#!/usr/bin/env run-singularity\n")
