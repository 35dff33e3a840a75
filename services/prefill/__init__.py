"""Prefill: computes prompts and pushes their KV away. Owns a prompt until its first token; knows no later one."""
