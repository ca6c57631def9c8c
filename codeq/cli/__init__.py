"""The command ``codeq``: a file for each noun, output.py says all that is said."""

from codeq.cli.app import main, run
from codeq.cli.output import EXIT_USAGE

__all__ = ["EXIT_USAGE", "main", "run"]
