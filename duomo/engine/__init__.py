"""The engine: sequences, blocks, steps and sampling over a model. Knows no sockets, services or clocks."""
