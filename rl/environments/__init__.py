"""What answers the policy: environments, their tools, and many turns as exact tokens."""
