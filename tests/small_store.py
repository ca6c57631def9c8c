"""codeq with constants so small that a short test sees logs change, recycled and flushed, and old
records removed or carried forward.

    python -m tests.small_store serve ...

With SMALL_REMOVAL_AFTER=file in the environment nothing is removed before that file exists.
"""

import os

import msgspec

from codeq.cli import main
from codeq.engine import shard, store
from codeq.engine.retention import Retention
from codeq.server import app

REMOVAL_AFTER = "SMALL_REMOVAL_AFTER"


def shrink() -> None:
    """Makes the constants of this process small."""
    store.WRITE_BUFFER_BYTES = 128 << 10
    store.MAX_WAL_BYTES = 1 << 20
    store.CUT_CHUNKS_MIN = 16
    shard.MAINTENANCE_MS = 100
    usual = app.shard_settings
    app.shard_settings = lambda config: msgspec.structs.replace(
        usual(config), straggler_slack_bytes=0
    )
    if os.environ.get(REMOVAL_AFTER):
        hold_removal(os.environ[REMOVAL_AFTER])


def hold_removal(file: str) -> None:
    """Lets removal wait for this file."""
    run = Retention.run

    def run_later(self: Retention, now_ms: int) -> None:
        if os.path.exists(file):
            run(self, now_ms)

    Retention.run = run_later  # type: ignore[method-assign]


if __name__ == "__main__":
    shrink()
    main()
