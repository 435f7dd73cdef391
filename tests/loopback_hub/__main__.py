"""``python -m loopback_hub --folder DIR`` serves each ``DIR/org/name`` as a model, without an account or internet."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from loopback_hub import LoopbackHub


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m loopback_hub", description=__doc__)
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one [default: 8765]")
    parser.add_argument("--folder", type=Path, help="folder of org/name/files to serve as models")
    parser.add_argument("--mode", choices=("lfs", "cdn"), default="lfs", help="whether downloads are redirected")
    options = parser.parse_args()
    hub = LoopbackHub(options.port)
    hub.mode = options.mode
    added = hub.add_folder(options.folder) if options.folder else []
    hub.start()
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={hub.token} HF_HUB_DISABLE_XET=1", flush=True)
    print(f"# {len(added)} models; Ctrl-C stops", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
