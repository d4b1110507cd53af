"""The actor of a run: its order, its operations, what it saves.

- actor.py: the Ray shell, which owns the run's CPUs and GPUs. Start here.
- call_journal.py: calls in order, repeats, cancellation; it knows no operation.
- worker.py: the operations of one run, a plain class.
- place.py: whose run it is, and where it saves.
- saving.py: saves: begun, carried into the store, made by themselves.
- step_notes.py: what the registry is told of each step.
- storage_actor.py: the actor that carries artifacts into the store.
- warm_process.py: a process kept warm for the next run.

It imports all of `actors` but the operations, which do not import it either.
"""
