"""The ecosystems in environments of their own, oldest and newest versions: `make test-integrations`."""
