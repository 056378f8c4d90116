"""What a machine can do, measured before a run depends on it: arithmetic, memory, links, clocks, disks."""
