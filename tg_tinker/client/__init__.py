"""What a program holds: `ServiceClient`, `TrainingClient`, and handles of calls.

- service.py: `ServiceClient`, the entry point.
- runs.py, placement.py: its part that starts runs and ends them; what actors occupy.
- artifacts.py, keys.py, records.py: its parts about saved artifacts, about keys, and about ledgers
  and audit logs.
- home.py, serving.py: the home made and checked; what is checked before a model is served.
- training.py: `TrainingClient`, one run: it checks, then sends.
- calls.py: its calls: their numbers and order, their queue, recovery, closing.
- future.py: the handle of a call that was sent.
- actor_link.py: one training actor, as a client reaches it.
- lost_calls.py: calls whose answer did not arrive, sent again.
- recovery.py: where a lost actor comes back, and what that means to the loop that used it.

It imports all of `tg_tinker` but demo and commands. It trains nothing, stores nothing and names no
package above: what it needs of them it asks `tg_tinker.backend` for.
"""
