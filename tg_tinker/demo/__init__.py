"""Runs `make demo`: a real, private fine-tune from start to finish, by the public API alone.

    from tg_tinker.demo import find_demo_model

- run.py: the demo itself: trains, samples before and after, saves, resumes.
- options.py: the options, the configuration of the run, and the location of its model.
- outcome.py: the results, printed and written.
- docstrings.py: the training text, questions and answers from Python's own documentation.
- meter.py: progress on the screen, and the record of a step.
- plots.py: pictures of training runs and audits; the only import of matplotlib.

The package imports `tg_tinker.client` and the packages below it. The service does all training.
Only commands, examples and benchmarks import this package.
"""

from tg_tinker.demo.options import find_demo_model

__all__ = ["find_demo_model"]
