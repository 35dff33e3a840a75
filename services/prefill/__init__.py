"""The prefill service: prompts in, KV to the decode replicas and first tokens to the gateway out."""
