"""Training: a run (files in, adapter out) around one loop over N adapters on one base."""
