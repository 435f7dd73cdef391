# /// script
# requires-python = ">=3.11"
# dependencies = ["weightspace-hub @ git+https://github.com/weightspace-hub/weightspace"]
# ///
"""Embeds models of the Hub, of files or of zoos, and publishes the table if asked to.

python hub_scripts/embed.py LOCATION... --encoder ORG/ENCODER --output FILE [options of weightspace embed]
    [--push-to ORG/NAME [--private]]
"""

from __future__ import annotations

import sys
from pathlib import Path

from huggingface_hub import HfApi

from weightspace.cli.jobs import run_job


def upload(output: str, repo_id: str, private: bool) -> int:
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.upload_file(
        path_or_fileobj=output,
        path_in_repo=Path(output).name,
        repo_id=repo_id,
        repo_type="dataset",
        commit_message="Embeddings of models",
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_job(["embed"], __doc__, upload))
