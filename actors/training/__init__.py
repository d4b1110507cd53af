"""The actor of a run; it stands on all other packages of `actors` but `operations`.

actor           the Ray shell: groups of calls, idling, parking
worker          the operations
saving          states on their way to artifacts
place           which run an actor has, and where its things lie
call_journal    order, repeats and cancellation of calls
step_notes      what the registry is told of steps
storage_actor   carries sealed files into the store
warm_process    a process with its libraries imported, for the next actor
"""
