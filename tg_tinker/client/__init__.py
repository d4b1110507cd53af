"""What a program holds: `ServiceClient`, `TrainingClient`, and handles of calls.

- service.py: `ServiceClient`, the entry point.
- runs.py, artifacts.py, records.py: its parts: runs, saved artifacts, a database that was put back.
- training.py: `TrainingClient`, one run: it checks, then sends.
- future.py: the handle of a call that was sent.
- actor_link.py: one training actor, as a client reaches it.
- lost_calls.py: calls whose answer did not arrive, sent again.
- recovery.py: what a lost actor means to the loop that used it.

It imports all of `tg_tinker` but demo and commands. It trains nothing, stores nothing and names no
package above: what it needs of them it asks `tg_tinker.backend` for.
"""
