"""Reports of results: figures, pictures, HTML, comparison, trackers."""
