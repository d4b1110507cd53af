"""Sealing and opening beside the bare cipher, on 512 MiB in memory.

Run by `python tests/bench_sealing.py`, about half a minute. The goal: `sealed_parts` reaches 80 %
of bare `AESGCM.encrypt_into`, which works through the same bytes in 1 MiB pieces on one thread,
into one buffer. Repeats are interleaved and a ratio is the median over repeats, so that a change
of the machine's speed meets all rows.

`seal` and `unseal` return a whole file in fresh memory, which the system maps page by page while
it is filled. That is most of their time, so they stand beside the bare cipher with that burden.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tg_tinker import segments
from tg_tinker.envelope import new_key, seal, sealed_parts, unseal
from tg_tinker.segments import SEGMENT

KEY, CONTEXT, NONCE, TAG = new_key(), b"artifact 7", bytes(12), 16
BARE, BARE_FRESH = "bare encrypt_into, one buffer", "bare encrypt_into, fresh memory"


def works(plain: memoryview) -> dict[str, tuple[str, Callable[[], object]]]:
    """By name: what it is compared with, and a pass over all of `plain`."""
    aes, sealed = AESGCM(KEY), seal(KEY, plain, CONTEXT)
    starts = range(0, len(plain), SEGMENT)
    buffer = memoryview(bytearray(SEGMENT + TAG))

    def bare() -> None:
        for start in starts:
            aes.encrypt_into(NONCE, plain[start : start + SEGMENT], None, buffer)

    def bare_fresh() -> None:
        fresh = memoryview(bytearray(len(plain) + TAG))
        for start in starts:
            place = fresh[start : start + SEGMENT + TAG]  # the next one overwrites the tag
            aes.encrypt_into(NONCE, plain[start : start + SEGMENT], None, place)

    def parts() -> None:
        for _ in sealed_parts(KEY, plain, CONTEXT):
            pass

    return {
        BARE: (BARE, bare),
        "sealed_parts, one thread": (BARE, on_one_thread(parts)),
        "sealed_parts": (BARE, parts),
        BARE_FRESH: (BARE_FRESH, bare_fresh),
        "seal": (BARE_FRESH, lambda: seal(KEY, plain, CONTEXT)),
        "unseal": (BARE_FRESH, lambda: unseal(KEY, sealed, CONTEXT)),
    }


def on_one_thread(work: Callable[[], object]) -> Callable[[], None]:
    def alone() -> None:
        usual, segments._THREADS_FROM = segments._THREADS_FROM, 2**32
        work()
        segments._THREADS_FROM = usual

    return alone


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    plain = memoryview(os.urandom(64 * SEGMENT) * (arguments.mebibytes // 64))
    rows = works(plain)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in track(range(arguments.repeats), "repeats"):
        for name, (_, work) in rows.items():
            times[name].append(seconds(work))

    table = Table(title=f"{arguments.mebibytes} MiB, medians of {arguments.repeats} repeats")
    for heading in ("", "GB/s", "of bare"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (beside, _) in rows.items():
        pairs = zip(times[beside], times[name], strict=True)
        ratio = statistics.median(bare / ours for bare, ours in pairs)
        speed = len(plain) / statistics.median(times[name]) / 1e9
        table.add_row(name, f"{speed:.2f}", f"{ratio:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
