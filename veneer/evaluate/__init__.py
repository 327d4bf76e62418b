"""How good an adapter is, with intervals: metrics, the run over a data file, and the report page."""
