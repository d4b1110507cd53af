"""The command `tg-tinker`: a thin shell over the SDK, one file for each group of commands.

- main.py: the program, and commands that have no group; it mounts all others.
- shared.py: the service that commands call, tables, errors in one line.
- cluster.py, clients.py, profile.py, doctor.py: clusters, runs, the time of a step, the machine.
- artifacts.py, sweep.py: saved artifacts, and what belongs to none.
- sampling.py, api_keys.py, http_client.py: serving and asking; keys of HTTP clients; the requests.
- privacy.py, audit_log.py, keys.py, registry.py: reports and self-audit; the log; tenant keys;
  the registry's database and its backups.

It imports the SDK and the demo, heavy parts inside the command that needs them, so that `--help` is
quick. A file imports `shared`, never `main`. What a program could want is left to the client.
"""
