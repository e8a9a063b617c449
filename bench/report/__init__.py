"""Benchmark runs as one offline page, PNG figures and a Markdown summary."""
