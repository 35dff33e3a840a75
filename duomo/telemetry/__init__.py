"""What SREs see: spans, metrics, logs, and parts that add up. Knows no service; every process builds its own."""
