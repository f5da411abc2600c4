"""What Flyball costs, measured against floors taken in the same run: `make bench`."""
