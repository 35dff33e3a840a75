"""KV transfer: moves KV between replicas and keeps the members' directory. Knows no model and no policy of the pools."""
