"""Decides and stores: the queues in memory, the journal, the store. No network, no asyncio."""

from codeq import errors
from codeq.engine import _wire

_wire.set_messages({number: row.stream_message for number, row in errors.BY_NUMBER.items()})
