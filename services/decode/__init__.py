"""Decode: continuous batching. Owns a request from its second token to its last; knows no HTTP."""
