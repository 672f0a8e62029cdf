"""Faces of raw video: detect, track, tell people apart, align."""
