"""codeq with a producer's development token that is an operator's as well.

python -m tests.operator_server serve --dev ...
"""

from codeq import config
from codeq.cli import main

if __name__ == "__main__":
    config.DEV_PRODUCER["scopes"] = ["codeq:operator"]
    main()
