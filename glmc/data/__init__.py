"""Long-tailed data: profiles, image sets, pair sampling and loaders."""
