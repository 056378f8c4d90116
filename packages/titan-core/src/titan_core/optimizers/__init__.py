"""How parameters are moved: AdamW and Muon on sharded parameters, and how their states are kept."""
