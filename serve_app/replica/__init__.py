"""Implements one replica of the application: its weights, engines and threads.

- replica.py: the replica itself. Start here.
- sources.py: finds the weights that a request names.
- engines.py: slot engines, each in its own thread, and the weights that each one holds.
- threads.py: threads for blocking work, separate for each tenant.
- metrics.py: counts and times at Ray's Prometheus endpoint.

The package imports `actors.sampling`, `actors.artifacts` and the packages below them. It knows
neither HTTP nor API keys.
"""
