"""Agents: one loop over any chat model, tools, the swarm, its traces, and worlds to measure it in (Kimi K2.5, Agent
Swarm)."""
