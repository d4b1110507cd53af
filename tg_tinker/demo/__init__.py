"""`make demo`: a real, private fine-tune, start to finish, by the public API alone.

    from tg_tinker.demo import find_demo_model

- run.py: the job itself: trains, asks before and after, saves, resumes.
- options.py: what it can be told, what it trains by it, and where its model lies.
- outcome.py: what came of it, shown and written.
- docstrings.py: its text, questions and answers from Python's own documentation.
- meter.py: progress, as it is shown and as it is written down.
- plots.py: pictures of training runs and audits, the door to matplotlib.

It imports `tg_tinker.client` and what that stands on. All training is done by the service, none
here; nothing imports it but commands, examples and benchmarks.
"""

from tg_tinker.demo.options import find_demo_model

__all__ = ["find_demo_model"]
