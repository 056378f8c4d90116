"""How each format keeps tensors: readers that give lazy tensors by name, and writers that stream them into files."""
