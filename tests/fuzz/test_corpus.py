# SPDX-License-Identifier: Apache-2.0
"""Every input that a fuzzer found worth keeping is read, or refused with the one error that people may see."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fuzz.readers import READERS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", READERS)
def test_kept_inputs_are_read_or_refused(name):
    read, refusal = READERS[name]
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        started = time.process_time()
        try:
            read(path.read_bytes())
        except refusal:
            pass
        except BaseException as error:
            raise AssertionError(f"{path.name}: {error!r}") from error
        assert time.process_time() - started < 5, path.name
