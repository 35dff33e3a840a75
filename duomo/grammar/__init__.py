"""Structured output: what a constraint lets come next. Knows no logits and no request's life; holds no torch."""
