"""Sweeps: recipes x options x seeds as parallel runs, and tables of their results."""
