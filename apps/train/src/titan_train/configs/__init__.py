"""Configurations by family; each public function of a module here is one, picked by `--module` and `--config`."""
