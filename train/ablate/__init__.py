"""`vaflow ablate`: tables of configurations, each trained with several seeds, beside the published numbers.

grid.py (tables as data) -> plan.py (runs by hash) -> pool.py and worker.py (training) -> statistics.py, results.py
(numbers) -> writing.py, page.py, plot.py (files). study.py puts them in this order.
"""

from vaflow.train.ablate.study import StudyResult, run_study

__all__ = ["StudyResult", "run_study"]
