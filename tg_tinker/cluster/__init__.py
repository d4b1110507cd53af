"""Contains all access to Ray: every request of the SDK to a cluster passes through this package.

- ray_calls.py: calls to actors and their refs; the translation of Ray's errors.
- messages.py: the form of requests and replies.
- connection.py: the search for a cluster, and the start of an embedded cluster.
- cluster.py: the actors on a cluster, and the placement of a new actor.
- node.py: a Ray node with the settings of TG-Tinker, for `tg-tinker up` and `down`.
- authentication.py: Ray's token, and the check that a cluster requires it.
- other_users.py: what other users of this machine cannot have written, replaced or opened.
- ports.py, ray_folder.py: the checks of a server's address and port, and of Ray's own folder.
- named_actors.py: the search for actors by name.
- remote_registry.py: the calls of other processes to the registry.
- interrupts.py: one way to stop for Ctrl-C, SIGTERM and SIGHUP; their delay during some calls.

The package imports the modules at the base of `tg_tinker`, `tg_tinker.storage` and
`tg_tinker.backend`. It loads Ray when Ray is first needed. `tg_tinker.client` gives calls their
meaning.
"""
