# SPDX-License-Identifier: Apache-2.0
"""Print results on standard output: texts of an image byte for byte, and JSON. Conversation is `messages`."""

from __future__ import annotations

import json
import sys


def write(text: str) -> None:
    """Print a text as it is; bytes that were no UTF-8 when it was read come out unchanged."""
    write_bytes(encode(text))


def write_bytes(data: bytes) -> None:
    """Print bytes."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def encode(text: str) -> bytes:
    """Return the bytes of a text, question marks for halves of characters that only JSON can write."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def write_json(value: object) -> None:
    """Print a value as JSON, indented by tabs as Singularity does."""
    text = json.dumps(value, indent="\t", ensure_ascii=False, separators=(",", ": "))
    write_bytes(text.encode("utf-8", "replace") + b"\n")
