"""Many runs at once: selectors, fleet commands, freezes, canaries."""
