"""One torch-free file a model family: its configuration, presets, roles, key maps and facts."""
