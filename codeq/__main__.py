"""``python -m codeq`` is the command ``codeq``."""

from codeq.cli import main

if __name__ == "__main__":
    main()
