"""Speed and memory against the systems a user would pick instead; results with provenance in `results/`."""
