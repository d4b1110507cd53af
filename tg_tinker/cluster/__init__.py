"""The door to Ray: everything that the SDK asks of a cluster goes through here.

- ray_calls.py: calls to actors, refs, Ray's errors as ours.
- messages.py: the one form of a request and of a reply.
- connection.py: finding a cluster, or starting one inside this process.
- cluster.py: who runs there, and where a new actor finds room.
- node.py: a Ray node with our settings, for `tg-tinker up` and `down`.
- ports.py: ports that a server is to listen at.
- named_actors.py: actors by their names.
- remote_registry.py: the registry as other processes call it.
- interrupts.py: Ctrl-C at moments that cannot be cut in two.

It imports values, `tg_tinker.storage` and `tg_tinker.backend`, and loads Ray when it is first
needed. What a call means is left to `tg_tinker.client`.
"""
