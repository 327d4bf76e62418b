"""Several adapters into one, or an adapter into its base."""
