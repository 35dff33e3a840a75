"""Owns what every test's process is told before torch is loaded. Knows no test."""

import os

# Spinning OpenMP threads on shared cores make a step thirty times slower (services/app.py).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
