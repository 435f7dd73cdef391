# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Publishes an encoder, a zoo or models. Nobody is there to ask: give --private, or --yes for a public repository.

python hub_scripts/push.py DIR ORG/NAME --yes [options of weightspace push]
"""

from __future__ import annotations

import sys

from weightspace.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
