"""Many sites on one machine, over the code that a deployment runs: nothing reaches around it."""
