"""Speed and memory of a training compared with a plain loop; the script is benchmark_glmc.py."""
