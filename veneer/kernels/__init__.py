"""Fused products: a torch reference and, where there is one, a Triton version, same signature."""
