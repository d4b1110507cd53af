"""Provides the objects that a program uses: `ServiceClient`, `TrainingClient`, call handles.

- service.py: `ServiceClient`, the entry point.
- planning.py: `plan_privacy`, which needs no cluster.
- runs.py, placement.py: the start and the end of runs; the resources that actors occupy.
- artifacts.py, keys.py, records.py: the methods of `ServiceClient` about artifacts, about keys, and
  about ledgers and audit logs.
- home.py, serving.py: the creation and check of the home; the checks before a model is served.
- training.py: `TrainingClient`, which checks the calls of one run and then sends them.
- calls.py: the numbers, the order and the queue of these calls; recovery and closing.
- future.py: the handle of a call that was sent.
- actor_link.py: the connection of a client to one training actor.
- lost_calls.py: the repetition of calls whose answer did not arrive.
- recovery.py: the recovery of a run whose actor is lost, and the error that its loop receives.

The package imports all of `tg_tinker` except the demo and the commands. It trains nothing and
stores nothing. It names no upper package and calls them only through `tg_tinker.backend`.
"""
