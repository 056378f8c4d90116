"""PyTorch parallelism from a table of roles: meshes, FSDP2, HSDP and DDP, layout-independent initialisation, optimizers, schedules."""

__version__ = "0.1.0"
