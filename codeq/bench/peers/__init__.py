"""Other queues, to be measured with the same life on the same machine: ``codeq bench --peer``."""
