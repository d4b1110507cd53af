"""One copy of the application: its weights, its engines, its threads.

- replica.py: what runs in each copy. Start here.
- sources.py: which weights a request means, and where they are.
- engines.py: slot engines in threads of their own, and which holds what.
- threads.py: threads for work that blocks, some for each tenant.
- metrics.py: counts and times at Ray's Prometheus endpoint.

It imports `actors.sampling`, `actors.artifacts` and what they stand on. It knows neither HTTP nor
API keys.
"""
