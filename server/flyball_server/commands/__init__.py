"""Commands to one run: checked, given, proposed, read back."""
