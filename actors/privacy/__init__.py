"""Makes a private step, from the batch to the weights, and attacks it.

- session.py: the whole path of a private step. A reviewer reads it in order.
- combinations.py: the combinations of contract, clip rule, unit, ... that are proven or refused.
- plan.py: derives the values that a `DPConfig` leaves out.
- comparison.py: what a budget buys under each contract.
- budget.py: the remaining budget of a run, and its charges.
- units.py: the unit that each row belongs to, and the rows of a step that count.
- known_units.py: which rows of a batch other datasets of the tenant know.
- poisson.py: the registered units, and the draw of each step.
- layers.py: the layers that a private run may have, and the mode in which they run.
- unit_gradients.py, capture.py: the gradient of each unit, by the fast path or row by row.
- gradient_probes.py: tests at creation whether these gradients are correct.
- clipping.py, noise.py: the bound on each unit; the noise.
- evaluation.py: releases a held-out loss with noise, at the cost of the held-out dataset.
- accountants.py: epsilon of Poisson samples, and tables of it; renyi.py: the Renyi bound;
  composition.py: the composed distribution of the privacy loss.
- attacks.py: measures what one unit moves and whether the noise is correct, on the real step.
- self_audit.py: runs the attacks and reports the results.

The package imports `actors.engine` and `actors.registry`. This package alone makes private
gradients; the engine applies them.
"""
