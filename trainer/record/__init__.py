"""What is recorded of a run besides its metrics: every episode with its tokens, and when everything happened."""
