"""Throughput beside a plain loop; `benchmark_glmc.py` is the script."""
