# SPDX-License-Identifier: Apache-2.0
"""Fuzz a reader, guided by the code that its inputs reach. Needs the package atheris, which no test does.

    python tests/fuzz/run.py squashfs|sif|recipe [-max_total_time=300] [further words of libFuzzer]

Starts from tests/fuzz/corpus, works in a folder of its own, and at the end brings back those inputs that reach code
no kept one reached. An input that crashes is written beside; once the reader is mended it belongs into the corpus.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent / "src")]
#: Bytes of the largest input that is worth the time.
LONGEST = {"squashfs": 4096, "sif": 8192, "recipe": 1024}
#: A bomb must not take the machine along (MiB), nor an input take long (seconds).
LIMITS = ["-rss_limit_mb=1024", "-timeout=20"]


def fuzz(name: str, words: list[str]) -> None:
    """Be the fuzzer: never returns."""
    import atheris

    with atheris.instrument_imports(include=["pysingularity"]):
        from readers import READERS

    read, refusal = READERS[name]

    def once(data: bytes) -> None:
        try:
            read(data)
        except refusal:
            pass

    # When merging, libFuzzer starts its first word anew as a program.
    atheris.Setup([os.environ["FUZZ_AGAIN"], f"-max_len={LONGEST[name]}", *LIMITS, *words], once)
    atheris.Fuzz()


def main() -> int:
    """Fuzz in a child, then keep what is new."""
    if len(sys.argv) < 2 or sys.argv[1] not in LONGEST:
        sys.exit(__doc__)
    name, words = sys.argv[1], sys.argv[2:]
    if "--child" in words:
        words.remove("--child")
        fuzz(name, words)
    kept = HERE / "corpus" / name
    kept.mkdir(parents=True, exist_ok=True)
    before = len(os.listdir(kept))
    with tempfile.TemporaryDirectory() as folder:
        again, new = Path(folder, "again"), Path(folder, "new")
        new.mkdir()
        again.write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} --child "$@"\n')
        again.chmod(0o755)
        environ = {**os.environ, "FUZZ_AGAIN": str(again)}
        result = subprocess.run([again, new, kept, f"-artifact_prefix={HERE}/", *words], check=False, env=environ)
        # Lines of code count here, and not how often they were run: the corpus stays small.
        merge = [again, "-merge=1", "-use_counters=0", kept, new]
        subprocess.run(merge, check=True, capture_output=True, env=environ)
    print(f"{name}: {len(os.listdir(kept)) - before} new inputs kept, {before} were there")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
