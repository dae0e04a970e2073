"""Agents as they are: code with a loop of its own, trained through an endpoint that a stock client speaks to."""

from rl.agents.context import Context as Context
