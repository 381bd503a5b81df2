"""The report of a scan: its image and how that came about, as PNG and as one HTML file."""
