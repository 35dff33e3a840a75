"""The gateway: the REST edge. Owns requests from the client's socket to their last token; knows no tensor."""
