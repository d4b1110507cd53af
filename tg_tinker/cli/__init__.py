"""Defines the command `tg-tinker`, a thin wrapper over the SDK, one file for each command group.

- main.py: the program, and the commands without a group; it mounts all other commands.
- shared.py: the service that commands call, tables, errors in one line.
- cluster.py, clients.py, profile.py, doctor.py: clusters, runs, the time of a step, the machine.
- artifacts.py, sweep.py: saved artifacts, and files that belong to no artifact.
- sampling.py, api_keys.py, http_client.py: serving, sampling and chat; API keys; HTTP requests.
- privacy.py, audit_log.py, keys.py, registry.py: reports and self-audit; the audit log; tenant
  keys; the registry's database and its backups.

The package imports the SDK and the demo. A command imports heavy modules in its function, so
`--help` is fast. A command file imports `shared`, never `main`. Functions that a program could need
belong to the client, not to this package.
"""
