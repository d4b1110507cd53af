"""`make bench`: one program, whose rooms each register what they measure.

    PYTHONPATH=.:tests python -m bench --only ragged

A room makes a `Bench` (name, about, minutes, what runs) and puts it into `BENCHES` of
`bench.catalogue`. What runs gets a `Run` and reports to it: a `Row` of the one table (a ratio, its
goal) or a `Sheet` of its own.

- __main__.py, catalogue.py: the command; every bench by its name.
- measure.py, report.py, machine.py: ratios and spreads; the table; what it was measured on.
- sides.py, child.py, loops.py: processes that are measured in turns, and what they execute.
- workloads.py: a comparison of two sides as data.
- training.py, size.py, sdk.py, start.py: steps; their cost by size; what SDK and Ray add.
- privacy.py, utility.py: what privacy costs, and how much of what is learned it leaves.
- sampling.py, serving.py: the sampling engine, and what Serve adds.
- storage.py, sealing.py, registry.py, audit.py: saving, the cipher, the registry, the audit log.
- peers.py, tinker_client.py: other open services, each through its own SDK.
"""
