# SPDX-License-Identifier: Apache-2.0
"""`Bootstrap: scratch`: nothing. The base folders of every image are put in afterwards by the build."""

from __future__ import annotations

from pysingularity.build.bootstrap import BootstrapRequest, BootstrapResult


def bootstrap(request: BootstrapRequest) -> BootstrapResult:  # noqa: ARG001
    """Leave the root empty."""
    return BootstrapResult(digest="scratch", source="scratch")
