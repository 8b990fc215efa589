"""Meters: what a network costs, counted or measured, and models that predict it from ratios."""
