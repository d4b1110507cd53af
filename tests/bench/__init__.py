"""Holds `make bench`: one program, in which each module registers what it measures.

    PYTHONPATH=.:tests python -m bench --only ragged

A module that measures defines `BENCH`, a `Bench` with a name, a summary, its minutes and the
function to run. `bench.catalogue` lists these modules in `ROOMS`. The function gets a `Run` and
adds results to it: a `Row` of the one table (a ratio and its goal), or a `Sheet` with its own
columns.

- __main__.py, catalogue.py: the command; all benches by name.
- measure.py, report.py, machine.py: ratios and spreads; the table; a description of the machine.
- sides.py, child.py, loops.py: processes that are measured in turns, and the loops that they run.
- workloads.py: a comparison of two sides as data.
- training.py, size.py, sdk.py, start.py: steps; their cost by size; the overhead of SDK and Ray.
- privacy.py, utility.py: the cost of privacy, and how much a private run still learns.
- sampling.py, serving.py: the sampling engine, and the overhead of Ray Serve.
- storage.py, sealing.py, registry.py, audit.py: saving, the cipher, the registry, the audit log.
- peers.py, tinker_client.py: other open services, each through its own SDK.
"""
