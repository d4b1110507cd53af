"""Holds the training actor of a run: the order of calls, the operations and the saves.

- actor.py: the Ray actor, which owns the CPUs and GPUs of the run. Start here.
- call_journal.py: the order of calls, repeats and cancellation; it knows no operation.
- worker.py: the operations of one run, in a plain class.
- place.py: the tenant, run and epoch of an actor, and where it saves.
- saving.py: saves that a client asks for, and automatic saves.
- step_notes.py: reports each step to the registry.
- storage_actor.py: the actor that writes artifacts into the store.
- warm_process.py: a process that is kept warm for the next run.

The package imports all of `actors` except the operations, which do not import this package either.
"""
