"""codeq with write buffers so small that a short test sees its logs change, recycled and flushed.

python -m tests.small_store serve ...
"""

from codeq.cli import main
from codeq.engine import store

if __name__ == "__main__":
    store.WRITE_BUFFER_BYTES = 128 << 10
    store.MAX_WAL_BYTES = 1 << 20
    main()
