"""The algorithm: types, objectives and the loop. Pure Python and torch."""

from rl import checkout

checkout.verify()
