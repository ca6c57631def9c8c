"""REST for those who look after the server as a whole."""

from __future__ import annotations

import msgspec

from codeq.engine.backup import Backup, is_name
from codeq.errors import BACKUP_NAME_INVALID, CodeqError
from codeq.model import BackupBody, BackupMade
from codeq.server.auth import Principal
from codeq.server.request import (
    Edge,
    Reply,
    Request,
    decode,
    encode,
    promise,
    refuse,
)

_backup = msgspec.json.Decoder(BackupBody)


async def backup(edge: Edge, request: Request, principal: Principal) -> Reply:
    """POST /admin/backup"""
    edge.require_ready()
    name = decode(_backup, await request.body(edge)).name
    if not is_name(name):
        raise refuse(BACKUP_NAME_INVALID)
    answer, done = promise(edge.loop)
    edge.shard.backups.make(name, done)
    outcome: Backup | CodeqError = await answer
    if isinstance(outcome, CodeqError):
        raise outcome
    return Reply(201, encode(BackupMade(outcome.path, outcome.bytes)))
