# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace"]
# ///
"""Makes a zoo of models on the Hub, and publishes it if asked to.

python hub_scripts/crawl.py --output ZOO [options of weightspace crawl] [--push-to ORG/NAME [--private]]
"""

from __future__ import annotations

import argparse
import sys

from weightspace.cli.main import main as weightspace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False, epilog="Other options: weightspace crawl -h"
    )
    parser.add_argument("--output", required=True, help="folder of the zoo")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="dataset repository to publish the zoo in")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, others = parser.parse_known_args()
    code = weightspace(["crawl", "--output", options.output, *others])
    if code == 0 and options.push_to:
        code = weightspace(["push", options.output, options.push_to, "--private" if options.private else "--yes"])
    return code


if __name__ == "__main__":
    sys.exit(main())
