"""Who asks and what they may: tokens, roles, projects, rates, certificates."""
