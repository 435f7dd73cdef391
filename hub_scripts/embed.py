# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace"]
# ///
"""Embeds models of the Hub, of files or of zoos, and publishes the table if asked to.

python hub_scripts/embed.py LOCATION... --encoder ORG/ENCODER --output FILE [options of weightspace embed]
    [--push-to ORG/NAME [--private]]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi

from weightspace.cli.main import main as weightspace


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], allow_abbrev=False, epilog="Other options: weightspace embed -h"
    )
    parser.add_argument("--output", required=True, type=Path, help="parquet file to write")
    parser.add_argument("--push-to", metavar="ORG/NAME", help="dataset repository to put the file into")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options, others = parser.parse_known_args()
    code = weightspace(["embed", "--output", str(options.output), *others])
    if code == 0 and options.push_to:
        api = HfApi()
        api.create_repo(options.push_to, repo_type="dataset", private=options.private, exist_ok=True)
        api.upload_file(
            path_or_fileobj=options.output,
            path_in_repo=options.output.name,
            repo_id=options.push_to,
            repo_type="dataset",
            commit_message="Embeddings of models",
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
