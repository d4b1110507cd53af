"""A private step, from batch to weight, and attacks on it.

- session.py: the whole way, for a reviewer to read in order.
- plan.py, budget.py: what is missing in a `DPConfig`; what is left, and charges.
- units.py, poisson.py: whom a row belongs to and who counts; registered units and their draw.
- layers.py: which layers a private run may have.
- unit_gradients.py, capture.py: gradients of units, by the fast way or one by one.
- clipping.py, noise.py: the bound; the noise.
- accountants.py: the door to the numerical accountants.
- attacks.py, self_audit.py: what one unit moves, whether noise is noise; all that on the real step.

It imports `actors.engine` and `actors.registry`. Only here is a private gradient made; the engine
takes it.
"""
