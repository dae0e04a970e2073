"""Do a run's chat template, parser and environment hold over many turns? Examined before anything starts."""
