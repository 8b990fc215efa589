"""Tasks that ship: one file per model and data, each with a function that returns an autoprune.Task."""
