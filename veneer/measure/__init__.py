"""Adapters measured: each alone, several beside each other, on their base; and whether a server loads them."""
