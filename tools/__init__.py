"""What makes the documentation: `reference.py` its lists, and `site.py` the site."""
