"""What a layout costs before it runs: arithmetic, and rehearsals on ranks that do not exist."""
