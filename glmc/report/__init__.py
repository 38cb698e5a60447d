"""The report of a result: figures, pictures, HTML, and trackers."""
