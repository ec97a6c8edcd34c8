"""The live policy of a run that trains: `serve.enabled`.

Owns: starting it beside the training, which does not wait for it. Does not know how it answers. Where the cluster is
the run's own, the application ends with it; on another one (RAY_ADDRESS) it stays, and serves on from the run's folder,
unless it has no engine but those of the run's workers.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from rollcast import cluster
from rollcast.config import RunConfig
from rollcast.errors import RollcastError
from rollcast.rundir import RunDir

if TYPE_CHECKING:
    from rollcast.live.app import LiveSpec

ENDS_S = 30.0
"""How long an end waits for a start that is still under way."""


def serve_alongside(config: RunConfig, folder: RunDir, say: Callable[[str], None]) -> Callable[[], None]:
    """Starts the application in a thread of its own; what becomes of it is said. Returns what ends it with the run."""
    where = cluster.namespace()
    deployed: list[LiveSpec] = []

    def start() -> None:
        from rollcast.live import app

        spec = app.spec_of(config, folder.path.absolute(), where)
        try:
            url = app.deploy(spec)
        except RollcastError as error:
            say(f"the live policy is not served: {error.what} {error.why} {error.fix}")
        else:
            deployed.append(spec)
            say(f"the live policy answers at {url}/v1")

    thread = threading.Thread(target=start, name="live policy", daemon=True)
    thread.start()

    def end() -> None:
        from rollcast.live import app

        thread.join(ENDS_S)
        for spec in deployed:
            app.remove(spec)

    return end if config.serve.mode == "shared" else lambda: None
