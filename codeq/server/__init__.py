"""The edges and the process around them."""

import os

# Read when the gRPC library is imported. It writes to standard error in a form of its own, and a
# line for every stranger whose handshake fails.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
