"""Studies with a known optimum: worlds that can be listed, and the frontier of reward and KL."""
