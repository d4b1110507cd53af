"""Implements the commands of an operator, which run independently of training.

- doctor.py: checks one machine.
- doctor_cluster.py: checks who can get into a cluster from this machine.
- doctor_nodes.py: checks whether the machines of a cluster fit each other.
- findings.py: the result of one check.
- sweep.py: removes files that belong to no artifact.
- expiry.py, verify.py: deletes expired artifacts; checks artifacts.
- keys.py: rotates, rewraps and retires tenant keys.
- restore.py: accepts a database that was restored from a backup.
- profile.py: measures where the time of a step goes.

The package imports all of `actors` except the actor of a run. It makes no decision about privacy or
access: each check is that of the package responsible for it.
"""
