"""What can be said of an engine and a workload without simulating them."""
