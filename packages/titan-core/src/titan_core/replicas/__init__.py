"""Replica groups that train together, and may come and go."""
