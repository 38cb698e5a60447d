"""Metrics of long-tailed classification, class priors, and results as text."""
