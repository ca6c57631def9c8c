"""The edges and the process around them."""

import os

# Read when the gRPC library is first used. It writes to standard error in a form of its own, and a
# line for every stranger whose handshake fails; and the server has no forks that go on with it.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
