"""`python -m vaflow`: for launchers that start modules, as torchrun does."""

from vaflow.cli import entry

if __name__ == "__main__":
    entry()
