"""`vaflow search`: random or Bayesian search over settings, scored by cross-validation within the training split.

trials.py (settings to search, proposals, successive halving, the log) -> study.py (training, results, files).
"""

from vaflow.train.search.study import run_nested_search, run_search
from vaflow.train.search.trials import SearchOptions, SearchResult

__all__ = ["SearchOptions", "SearchResult", "run_nested_search", "run_search"]
