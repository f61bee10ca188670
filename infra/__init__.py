"""Where it runs: the services on one machine, and what they are told."""
