"""The weight channel, from the learner's sender to the engine's live model."""
