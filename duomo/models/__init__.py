"""The models: configuration, weights and plain single-device modules. Knows nothing of batches, services or processes."""
