"""Benches of shmpool: `python -m benches`. What each measures, and how to read it, is in README.md beside this file."""
