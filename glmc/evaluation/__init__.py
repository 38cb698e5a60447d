"""Long-tail metrics, class priors, and text tables."""
