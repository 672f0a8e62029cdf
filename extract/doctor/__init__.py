"""Checks of a dataset's contents: `vaflow check`."""
