"""Studies with exact answers: finite worlds, and the frontier of reward against KL."""
