"""Run vaflow commands in one process: each argument is one command, a JSON list of words. Prints their exit codes."""

import json
import sys

from vaflow.cli import main

if __name__ == "__main__":
    codes = [main(json.loads(words)) for words in sys.argv[1:]]
    print(f"exit codes {codes}")
