"""The tables of scripts/benchmark, a file for each kind, and how all of them are measured and shown."""
