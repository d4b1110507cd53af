"""Compares sealing and opening with the bare cipher, on 512 MiB in memory.

The goal: `sealed_parts` reaches 80 % of the speed of bare `AESGCM.encrypt_into`, which encrypts the
same bytes in 1 MiB pieces on one thread, into one buffer.

`seal` and `unseal` return a whole file in fresh memory, which the system maps page by page while
it is filled. Mapping takes most of their time, so they are compared with the bare cipher into fresh
memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.measure import Bench, Goal, Row, Run, Sheet, Spread, in_turns, ratios
from tg_tinker.storage import segments
from tg_tinker.storage.envelope import new_key, seal, sealed_parts, unseal
from tg_tinker.storage.segments import SEGMENT

KEY, CONTEXT, NONCE, TAG = new_key(), b"artifact 7", bytes(12), 16
MEBIBYTES, PARTS = 512, "sealed_parts"
BARE, BARE_FRESH = "bare encrypt_into, one buffer", "bare encrypt_into, fresh memory"


def works(plain: memoryview) -> dict[str, tuple[str, Callable[[], object]]]:
    """Returns, by name, what a work is compared with, and a function that processes `plain`."""
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
        PARTS: (BARE, parts),
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


def run(bench: Run) -> None:
    plain = memoryview(os.urandom(64 * SEGMENT) * (MEBIBYTES // 64))
    rows = works(plain)
    times = in_turns({name: work for name, (_, work) in rows.items()}, bench.times(9), "sealing")
    table = []
    for name, (beside, _) in rows.items():
        ratio = ratios(times[beside], times[name])
        speed = Spread.of(len(plain) / taken / 1e9 for taken in times[name])
        table.append((name, speed.shown(" GB/s"), ratio.shown("x")))
        if name == PARTS:
            goal = Goal(0.8)
            bench.rows.append(Row("sealed-parts", "sealed_parts", "the bare cipher", ratio, goal))
    bench.sheets.append(Sheet(f"sealing {MEBIBYTES} MiB", ("", "speed", "relative to bare"), table))


BENCH = Bench("sealing", "sealing and opening against the bare cipher", 0.5, run)
