"""Baselines for wide tasks: agents whose replies are scripted, so that score, time and cost can be computed."""
