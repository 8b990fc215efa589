"""Strategies: conversations over ask and tell that see numbers only."""
