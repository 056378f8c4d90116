"""Pipeline parallelism: cutting a model into stages, and the order in which they work."""
