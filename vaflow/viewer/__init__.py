"""Pages about predictions: the viewer of clips, the report of runs, ratings by hand, and the overlay video.

These modules read files that are stable (prediction CSV, `metrics.json`, `history.csv`, `config.toml`, the cache).
"""
