"""Makes a private step, from the batch to the weights, and attacks it.

- session.py: the whole path of a private step. A reviewer reads it in order.
- plan.py: derives the values that a `DPConfig` leaves out.
- budget.py: the remaining budget of a run, and its charges.
- units.py: the unit that each row belongs to, and the rows of a step that count.
- poisson.py: the registered units, and the draw of each step.
- layers.py: the layers that a private run may have, and the mode in which they run.
- unit_gradients.py, capture.py: the gradient of each unit, by the fast path or row by row.
- gradient_probes.py: tests at creation whether these gradients are correct.
- clipping.py, noise.py: the bound on each unit; the noise.
- accountants.py: the only module that imports the numerical accountants.
- attacks.py: measures what one unit moves and whether the noise is correct, on the real step.
- self_audit.py: runs the attacks and reports the results.

The package imports `actors.engine` and `actors.registry`. This package alone makes private
gradients; the engine applies them.
"""
