"""Compares TG-Tinker with what its users would use otherwise, and prints one table.

Every comparison runs its two sides in turns, each in a fresh process. It reports the median of the
ratios of neighboring turns with [smallest..largest]. Read the ratios: absolute times depend on the
machine, ratios far less. A ratio of time is theirs / ours, so 1.60x is 1.6 times as fast. A ratio
of memory is ours / theirs, so 0.48x is less than half.

The program writes bench-output/bench.json, bench.png (if a goal was measured) and the logs of the
measured processes. They replace the files of the previous run. Ctrl-C keeps the results so far.
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from bench import machine, report
from bench.catalogue import benches, selected
from bench.measure import SCREEN, Bench, Run
from bench.peers import not_run
from bench.workloads import OUTPUT
from tg_tinker.demo.options import find_demo_model

INTERRUPTED = 130
"""The exit status after Ctrl-C."""


def parser(known: dict[str, Bench]) -> argparse.ArgumentParser:
    lines = [
        f"  {name:<10}{'*' if bench.usual else ' '} {bench.minutes:>4g} min  {bench.about}"
        + (f"\n{'':23}{', '.join(bench.workloads)}" if bench.workloads else "")
        for name, bench in known.items()
    ]
    found = argparse.ArgumentParser(
        usage="make bench ARGS='[--only NAME] [--quick] [--repeats N] ...'",
        description=__doc__,
        epilog="benches, with their workloads (* runs without --only):\n"
        + "\n".join(lines)
        + "\n\nexamples:\n  make bench ARGS='--only ragged --repeats 9'"
        "\n  make bench ARGS=--quick\n  make bench ARGS='--only sampling --markdown'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--only", action="append", default=[], metavar="NAME",
        help="a bench or workload to run; may be repeated (default: those marked *)",
    )  # fmt: skip
    found.add_argument("--all", action="store_true", help="run every bench except peers (an hour)")
    found.add_argument(
        "--quick", action="store_true", help="run few workloads, with two turns each (2 minutes)"
    )
    found.add_argument(
        "--repeats", type=at_least_one, metavar="N",
        help="timed turns of each side (default: a number for each workload)",
    )  # fmt: skip
    found.add_argument(
        "--markdown", action="store_true", help="print tables in Markdown for docs/benchmarks.md"
    )
    found.add_argument(
        "--model", help="hub id, Hugging Face directory or GGUF file (default: SmolLM2-135M)"
    )
    return found


def at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than one turn: use 1 or more")
    return number


def main(arguments: list[str] | None = None) -> int:
    known = benches()
    options = parser(known).parse_args(arguments)
    try:
        wanted = selected(known, options.only, options.all)
    except KeyError as error:
        SCREEN.print(f"no bench or workload is named {error}: see --help for all", style="red")
        return 2
    if options.quick and not options.only:
        wanted = {"training": frozenset()}
    facts = machine.described()
    SCREEN.print(f"load: {facts['load before']}", highlight=False)
    found = Run(options.model or str(find_demo_model()), options.repeats, options.quick)
    status = 0
    try:
        measure([(known[name], only) for name, only in wanted.items()], found, facts)
    except KeyboardInterrupt:
        SCREEN.print("stopped: these are the results so far", style="yellow")
        status = INTERRUPTED
    if not options.only:
        found.rows += not_run()
        deliver(facts, found)
    sheets = ([report.as_sheet(found.rows)] if found.rows else []) + found.sheets
    if options.markdown:
        Console().print(report.markdown(facts, sheets), soft_wrap=True, markup=False)
    else:
        show(facts, sheets)
    SCREEN.print(f"written: {OUTPUT}/bench.json and other files in that folder", highlight=False)
    return status


def measure(wanted: list[tuple[Bench, frozenset[str]]], found: Run, facts: dict[str, str]) -> None:
    """Runs each bench with its workloads. Writes the results after each bench, also if it stops."""
    started = time.monotonic()
    for bench, only in wanted:
        found.only = only
        SCREEN.print(f"{bench.name}: {bench.about}", style="bold")
        try:
            bench.run(found)
        finally:
            facts["took"] = f"{(time.monotonic() - started) / 60:.1f} minutes"
            deliver(facts, found)


def deliver(facts: dict[str, str], found: Run) -> None:
    """Writes the results and the picture. Removes a picture that is from another run."""
    OUTPUT.mkdir(exist_ok=True)
    report.write_json(OUTPUT / "bench.json", facts, found.rows, found.sheets)
    if not report.draw(found.rows, OUTPUT / "bench.png", facts):
        (OUTPUT / "bench.png").unlink(missing_ok=True)


def show(facts: dict[str, str], sheets: list[report.Sheet]) -> None:
    screen = Console(width=None if sys.stdout.isatty() else 160)
    for name, value in facts.items():
        screen.print(f"{name + ':':<13}{value}", highlight=False)
    for sheet in sheets:
        screen.print(report.table(sheet))


if __name__ == "__main__":
    sys.exit(main())
