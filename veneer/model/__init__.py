"""The base language model: loading, fingerprint, packed forward, losses, generation."""
