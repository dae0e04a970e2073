"""Engines and tiny models for the tests that run real vLLM V1."""

from engine_fixtures import live as live
from engine_fixtures import tiny as tiny
