"""Holds the rules that a tenant can verify: those of ledgers and of the audit log.

- entries.py: entries of a ledger: format, hash and position.
- ledger.py: the ledger of a dataset, a hash-chained list, and its rules.
- audit_log.py: the audit log of a tenant: rows, chain and verification.
- heads.py: signed heads of audit logs and ledgers.
- successions.py: how a signing key follows another, and which key is in force at a row.
- files.py: exports of the audit log, and files with kept heads.
- sums.py: sums of 1 / sigma^2, which are never rounded down.
- accounting.py: epsilon of Gaussian mechanisms in closed form.
- figures.py: what was spent at other deltas, and for several units together.
- planning.py: a comparison of what a budget buys under each contract.
- report.py: the privacy of runs and datasets: values, report and certificate.

The package imports value modules and `tg_tinker.storage`, so an auditor needs no cluster.
`actors.registry` decides who writes records, and in which transaction.
"""
