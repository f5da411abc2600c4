"""What happened, for people and other programs: the record read back, signed heads, webhooks."""
