# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Trains a zoo of small networks, or imports one from a folder, and publishes it if asked to.

python hub_scripts/build_zoo.py train --output ZOO [options of weightspace zoo train] [--push-to ORG/NAME]
python hub_scripts/build_zoo.py import FOLDER --output ZOO [options of weightspace zoo import] [--push-to ORG/NAME]
"""

from __future__ import annotations

import sys

from weightspace.cli.jobs import run_job

if __name__ == "__main__":
    if sys.argv[1:2] not in (["train"], ["import"]):
        print(f"{__doc__}\nerror: the first word is train or import", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_job(["zoo", sys.argv.pop(1)], __doc__))
