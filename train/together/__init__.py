"""Training of several runs at once: runs of one architecture on the same windows take their steps together."""
