"""The live policy of a run that trains: `serve.enabled`.

Owns: starting it beside the training, which does not wait for it. Does not know how it answers. Where the cluster is
the run's own, the application ends with it; on another one (RAY_ADDRESS) it stays, and serves on from the run's folder.
"""

import threading
from collections.abc import Callable

from rollcast import cluster
from rollcast.config import RunConfig
from rollcast.errors import RollcastError
from rollcast.rundir import RunDir


def serve_alongside(config: RunConfig, folder: RunDir, say: Callable[[str], None]) -> threading.Thread:
    """Starts the application in a thread of its own; what becomes of it is said."""
    where = cluster.namespace()

    def start() -> None:
        from rollcast.live import app

        try:
            url = app.deploy(app.spec_of(config, folder.path.absolute(), where))
        except RollcastError as error:
            say(f"the live policy is not served: {error.what} {error.why} {error.fix}")
        else:
            say(f"the live policy answers at {url}/v1")

    thread = threading.Thread(target=start, name="live policy", daemon=True)
    thread.start()
    return thread
