"""Sweeps: recipes x options x seeds, run side by side, and their tables."""
