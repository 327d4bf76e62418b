"""From a data file to token ids, loss masks and a seeded order of batches."""
