# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Makes a zoo of models on the Hub, and publishes it if asked to.

python hub_scripts/crawl.py --output ZOO [options of weightspace crawl] [--push-to ORG/NAME [--private]]
"""

from __future__ import annotations

import sys

from weightspace.cli.jobs import run_job

if __name__ == "__main__":
    sys.exit(run_job(["crawl"], __doc__))
