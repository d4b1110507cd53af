"""What a tenant can verify: the rules of ledgers and of the audit log, as pure functions.

- entries.py: entries of a ledger: form, hash and place.
- ledger.py: the ledger of a data set, a hash-chained list, and the rules that it obeys.
- audit_log.py: the audit log of a tenant: rows, chain and signed heads.
- heads.py: signed heads of ledgers.
- files.py: exports of the audit log, and heads that somebody keeps.
- accounting.py: epsilon of Gaussian mechanisms in closed form.
- report.py: what privacy looks like from outside: report and certificate.

It imports values and `tg_tinker.storage`, so that an auditor needs no cluster. Who writes records,
and in which transaction, is left to `actors.registry`.
"""
