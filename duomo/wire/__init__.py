"""The wire: every message between processes, its codec and its sockets. Knows no torch, no Ray and no service."""
