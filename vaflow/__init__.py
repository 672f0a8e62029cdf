"""vaflow: valence and arousal from video with speech, in two stages with a feature cache between them."""

__version__ = "0.1.0"
