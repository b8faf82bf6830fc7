"""`broadcastable demo`: a chat in several windows, to see what the package does before writing a line."""
