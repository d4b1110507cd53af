"""`make bench`: one program, whose rooms each register what they measure.

    PYTHONPATH=.:tests python -m bench --only ragged

A room makes a `Bench` (name, about, minutes, what runs) and puts it into `BENCHES` of
`bench.catalogue`. What runs gets a `Run` and reports to it: a `Row` of the one table (a ratio, its
goal) or a `Sheet` of its own. `measure` holds ratios and spreads, `sides` the processes that are
measured in turns, `loops` what they execute.
"""
