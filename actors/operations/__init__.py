"""What an operator runs, beside all training.

- doctor.py, doctor_cluster.py, doctor_nodes.py, findings.py: what to mend on a machine; who could
  get into a cluster; whether its machines fit; a finding.
- sweep.py, expiry.py, verify.py: what belongs to no artifact; artifacts whose time is over; all
  artifacts checked.
- keys.py: tenant keys rotated, wrapped anew, retired.
- restore.py: going on from a database that was put back.
- profile.py: where the time of a step goes.

It imports all of `actors` but the actor of a run. It decides nothing about privacy or access: each
check is the one of the package it belongs to.
"""
