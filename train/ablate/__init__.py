"""`vaflow ablate`: tables of configurations, each trained with several seeds, next to the published numbers.

grid.py (tables), schedule.py (runs and their hashes), pool.py (training), results.py (scores), report.py (files);
study.py calls them in this order. workers.py and ray_workers.py are the workers of the pool.
"""

from vaflow.train.ablate.study import StudyResult, run_study

__all__ = ["StudyResult", "run_study"]
