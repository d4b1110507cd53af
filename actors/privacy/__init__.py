"""The private step: plan, unit gradients, clip, charge, noise; and attacks on all that.

It stands on `engine` and `registry`. To review it, read `session` from top to bottom.

    session         the main path from a batch to a weight
    units           whose a row is, and which rows count
    unit_gradients  backward passes, unit by unit, and their clipped sum
    capture         the fast way to gradients of single units
    clipping        the bound; `privatise` alone makes a private gradient
    noise           from the operating system, without a seed
    budget          a run's way to its data set's ledger: each charge before its noise
    poisson         samples that the server draws
    plan            what a run asks of a budget
    accountants     the numbers of sampled mechanisms
    layers          which layers have a private form
    attacks         what one unit moves, whether the noise is noise, who was in a step
    self_audit      runs these attacks and reports
"""
