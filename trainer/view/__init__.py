"""What does a browser show of a run? `unison view`."""
