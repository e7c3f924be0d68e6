# SPDX-License-Identifier: Apache-2.0
"""`singularity instance`: containers that go on in the background, by name."""

from __future__ import annotations

SUBCOMMANDS: dict[str, tuple[str, str, str]] = {
    "start": ("instance_start", "Instances", "Start an instance and its startscript"),
    "run": ("instance_run", "Instances", "Start an instance and its runscript"),
    "list": ("instance_list", "Instances", "List running instances"),
    "stop": ("instance_stop", "Instances", "Stop running instances"),
    "logs": ("instance_logs", "Instances", "Show what an instance has printed"),
    "stats": ("instance_stats", "Instances", "Show what an instance uses"),
}
